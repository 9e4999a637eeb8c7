"""The table of success rates that evaluate.py and ppo_loop.py print."""


def print_table(result):
    """One line per task, one column per policy: successes/trials [Wilson 95 % interval]; for two, their difference. Where the end of
    an episode counts, `ever` tells how many succeeded at some step: what the oracle would have stopped in time."""
    def cell(row):
        rate, low, high = (100 * x for x in (row["successes"] / row["trials"], *row["interval"]))
        ever = f" ever {row['ever_successes']}" if stop != "oracle" else ""
        return f"{row['successes']:3d}/{row['trials']:<3d} {rate:5.1f} % [{low:4.1f}, {high:4.1f}]{ever}"
    names, stop = list(result["policies"]), result["protocol"]["stop"]
    print(f"\n{'real LIBERO, stop: ' + stop:44s}" + "".join(f"{n:42s}" for n in names))
    for task, row in result["policies"][names[0]]["tasks"].items():
        cells = [cell(result["policies"][n]["tasks"][task]) for n in names]
        print(f"{(task + ' ' + row['instruction'])[:43]:44s}" + "".join(f"{c:42s}" for c in cells))
    print(f"{'all':44s}" + "".join(f"{cell(result['policies'][n]):42s}" for n in names))
    if "difference" in result:
        mean, low, high = (100 * x for x in result["difference"])
        print(f"RL - SFT, paired: {mean:+.1f} points [{low:+.1f}, {high:+.1f}] (95 %), stop rule: {stop}; "
              f"real interactions used in training: {result['real_interactions']} steps, {result['exploration_episodes']} exploration episodes")
