"""Put LIBERO where an exploration episode was: what branches and the rollouts of `python ppo_loop.py --env libero` start from."""
from evaluate import EXPLORE_SEED, STRIDE


def resume_at(env, episode, step):
    """Reset `env` to the layout of exploration `episode`, then to its state after `step` control steps -> observation."""
    env.reset(seed=EXPLORE_SEED + episode.index % STRIDE)  # a branch has the layout of the episode that it goes on from
    substeps = round(env.env.env.control_timestep / env.env.env.model_timestep)
    for action in episode.actions[:step, 6:].repeat(substeps, 0):
        env.env.robots[0].gripper.format_action(action)  # robosuite ramps the fingers: where they are told to be is in no state
    env.set_state(episode.states[step])
    return env.observe()
