"""What `python evaluate.py --imagine` replays: parts of episodes that look like LOOP's rollouts, for the judge to learn from."""
import dataclasses

import numpy as np

import data
from world_sim import arrival


def short_parts(episode, length, number=4):
    """`number` parts of an episode, of 16 to `length` control steps, from stored frames before its success, half of them from less than
    `length` before it if there is one. Their indices, 5000 apart, keep every fifth episode held out. Raises UserError."""
    data.require(length >= 16, f"got --part {length}, expected at least 16 control steps, or 0 for whole episodes")
    rng, steps, T = np.random.default_rng(episode.index), episode.frame_steps, len(episode.actions)
    before = ~episode.success[steps] & (steps <= T - 16)
    near = before & (np.argmax(episode.success) - steps <= length) if episode.success.any() else before
    parts = []
    for k in range(number if before.any() else 0):
        start = steps[rng.choice(np.flatnonzero(near if k < number // 2 and near.any() else before))]
        end = min(T, start + length)
        shown, states = (start <= steps) & (steps <= end), slice(start, end + 1)
        parts.append(dataclasses.replace(
            episode, frames=episode.frames[shown], frame_steps=steps[shown] - start, proprio=episode.proprio[states],
            actions=episode.actions[start:end], success=episode.success[states], states=episode.states[states],
            index=episode.index + 5000 * (k + 1), wrist_frames=None, before=arrival(episode, start)))
    return parts
