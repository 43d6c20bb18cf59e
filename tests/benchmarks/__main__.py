"""Runs the benchmarks and prints, or with `--write` also records, a table of what they measured."""

import argparse
import importlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.setting import Setting

NAMES = ("step", "throughput", "latency", "size", "growth", "idle", "recovery")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"what to run: {', '.join(NAMES)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, to see that it works")
    parser.add_argument("--write", action="store_true", help=f"write the table into {report.PAGE.name}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"expected any of {', '.join(NAMES)}, got: {', '.join(sorted(unknown))}")
    if options.write and (options.names or options.quick):
        parser.error("--write records one whole run; leave the names and --quick out")
    directory = Path(tempfile.mkdtemp(prefix="durable-bench-"))
    directory.chmod(0o755)  # PostgreSQL is nobody when we are root
    try:
        run(options.names or NAMES, Setting(directory, is_quick=options.quick), is_written=options.write)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(names: list[str] | tuple[str, ...], setting: Setting, *, is_written: bool) -> None:
    os.environ.update(setting.environment())
    load, results = os.getloadavg()[0], []
    for name in names:
        began = time.monotonic()
        print(f"{name} …", flush=True)
        found = importlib.import_module(f"tests.benchmarks.{name}").measure(setting)
        for result in found:
            print(f"  {result.what}: {result.measured}; {result.target or 'no target'}; {result.absolute}", flush=True)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
        results += found
    text = report.table(results, [setting.postgres.name, setting.redis.name], load)
    print(f"\n{text}")
    if is_written:
        report.write(text)
    setting.redis.stop()
    setting.postgres.stop()


if __name__ == "__main__":
    main()
