"""Renders the shipped demonstrations, which are states and actions, in simulator processes. Called by `data.load_episodes`."""
from concurrent.futures import wait

import numpy as np
from tqdm import tqdm

import data


def render_demos(root, tasks, image_size, demos_per_task, wrist=False, workers=2):
    """Render what is not yet in `root/rendered/<size>/<suite>/<task>/` -> {(task name, "expert"): {demo id: path}}."""
    shipped, found, jobs, frames = np.load(root / "libero_demos.npz"), {}, [], 0
    for task in tasks:
        key, folder = f"{task.suite}_{task.index}", root / "rendered" / f"{image_size}{'-wrist' * wrist}" / task.suite / task.name
        ids = data.spread(int(shipped.get(f"{key}/num_demos", 0)), demos_per_task)
        found[task.name, "expert"] = {i: folder / f"demo_{i}.hdf5" for i in ids}
        fresh = lambda path: path.exists() and path.stat().st_mtime > (root / "libero_demos.npz").stat().st_mtime
        missing = [(i, path) for i, path in found[task.name, "expert"].items() if not fresh(path)]
        parts = (missing[::2], missing[1::2]) if len(tasks) < 4 else (missing,)  # two workers for one task, one environment for many
        jobs += [(root, task, part, image_size, wrist) for part in parts if part]
        frames += sum(len(shipped[f"{key}/success_{i}"]) for i, _ in missing)
    if not jobs:
        return found
    paths = [path for job in jobs for _, path in job[2]]
    print(f"rendering {len(paths)} shipped demonstrations at {image_size}x{image_size}: {frames} frames, "
          f"about {frames * 0.06 * (1 + wrist) / 60:.0f} min on two cores")
    with data.process_pool(min(workers, len(jobs))) as pool, tqdm(total=len(paths), unit="demo", mininterval=2) as bar:
        pending = [pool.submit(data._render_task, *job) for job in jobs]
        while pending:
            done, pending = wait(pending, timeout=1)
            bar.update(sum(fresh(path) for path in paths) - bar.n)
            for job in done:
                job.result()
    return found
