"""Does a model of the trials pay? TPE (optuna) against log-uniform draws, both 100 plans of MiniLM at 15 %.

python benchmarks/search_tpe.py (needs optuna; data below LRCOMPRESS_SHARED). Same start, spread, projection and
validation sentences for both. Writes results/search_tpe.json.
"""

import tempfile
import time
from dataclasses import asdict
from math import exp, log
from pathlib import Path
from typing import Any

from beds import HERE, bed, commit, write_result

from lrcompress import build, pipeline
from lrcompress import recipe as recipes
from lrcompress.progress import Display
from lrcompress.rank_stages import bench
from lrcompress.ranks.base import check_reachable, make_plan, project
from lrcompress.seeds import uniform

TRIALS, SPREAD, EXAMPLES, KEEP = 100, 2.0, 500, 0.15


def main() -> None:
    """Both searches."""
    import optuna  # type: ignore[import-not-found]  # the extra `bench`

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    model, recipe = bed("minilm_sst2")
    settings = ["baselines=[]", "timing=null", f"ranks={{kind: uniform, keep_parameters: {KEEP}}}"]
    with tempfile.TemporaryDirectory() as runs:
        work = pipeline.open_workspace(
            model, recipes.resolve(recipe, settings)[1], Path(runs) / "run", display=Display()
        )
        pipeline.execute(work, until="spectra")
        context = bench(work, None, Path(runs), examples=EXAMPLES)
        layers, bounds = work.layers, work.recipe.ranks.bounds(work.layers)
        budget = check_reachable(layers, KEEP, bounds)
        names, width = list(layers), log(SPREAD)

        def score(exponents: list[float]) -> tuple[float, dict[str, Any]]:
            wanted = {name: exp(x) * KEEP * layers[name].break_even for name, x in zip(names, exponents, strict=True)}
            stretch = max((layers[name].break_even + 1) / wanted[name] for name in names)
            found = context.score(make_plan(layers, project(layers, wanted, budget, bounds, stretch=stretch)))
            assert found.kl is not None
            return found.kl, asdict(found)

        began = time.perf_counter()
        drawn = [
            score([(2 * draw - 1) * width for draw in uniform(len(names), 0, "random_search", trial)])[0]
            for trial in range(1, TRIALS)
        ]
        random_seconds = time.perf_counter() - began
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, multivariate=True))
        began = time.perf_counter()
        study.optimize(
            lambda trial: score([trial.suggest_float(name, -width, width) for name in names])[0], n_trials=TRIALS - 1
        )
        start = score([0.0] * len(names))[0]
        value = {
            "command": "python benchmarks/search_tpe.py", "commit": commit(),
            "environment": build.environment(work).model_dump(), "optuna": optuna.__version__,
            "keep": KEEP, "trials": TRIALS, "spread": SPREAD, "examples": EXAMPLES, "start": start,
            "random": {"kl": drawn, "seconds": random_seconds},
            "tpe": {
                "kl": [trial.value for trial in study.trials], "seconds": time.perf_counter() - began,
            },
        }  # fmt: skip
    write_result(HERE / "results" / "search_tpe.json", value)


if __name__ == "__main__":
    main()
