"""How evaluate.py and ppo_loop.py write results, which call this."""
import json

import data


def save_json(path, value):
    """Write JSON that any reader takes: what was not measured is null, not NaN."""
    finite = lambda x: {k: finite(v) for k, v in x.items()} if isinstance(x, dict) else None if x != x else x
    with data.atomic(path) as part:
        part.write_text(json.dumps(finite(value), indent=1))
