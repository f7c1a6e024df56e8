"""The data steps by hand, without Prefect:  python -m corpora STEP --help"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpora import blocks, demo, verify
from corpora.errors import InputError, run_cli
from corpora.fetch import fetch
from corpora.files import data_root, write_aside, write_json
from corpora.ledger import check_laws, total
from corpora.lock import load_lock
from corpora.prepare import block_files, prepare
from corpora.progress import Progress, emit
from corpora.settings import DataSettings


def main() -> int:
    """Parse the command line and run one step; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m corpora",
        description="Turn text shards into blocks of token ids, step by step. RECIPE is a name in deployments/ "
        "(demo, 13m, 2b, ...) or a path ending in .toml. Data goes to $PILELINE_DATA (default: data/).",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    steps.add_parser("build-demo", help="build the demo corpus from the Python on this machine")

    step = steps.add_parser("fetch", help="download and verify a recipe's shards")
    step.add_argument("recipe", metavar="RECIPE")
    step.add_argument(
        "--shard", action="append", help="only this shard (may be given again); default: all of the recipe"
    )

    step = steps.add_parser("prepare", help="clean, tokenize and pack fetched shards into blocks")
    step.add_argument("recipe", metavar="RECIPE")
    step.add_argument(
        "--shard", action="append", help="only this shard (may be given again); default: all of the recipe"
    )
    step.add_argument("--events", action="store_true", help="report progress and result as JSON lines")

    step = steps.add_parser("stats", help="show the ledger of prepared shards")
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with prepared shards under it")

    step = steps.add_parser("verify", help="check the hashes and recount the blocks of prepared shards")
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with prepared shards under it")

    step = steps.add_parser("convert", help="write prepared blocks in the other format")
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with prepared shards under it")
    step.add_argument("out", metavar="OUT", type=Path, help="new folder; it gets the same layout")
    step.add_argument("--format", choices=("arrow", "parquet"), default="parquet", help="default: parquet")

    arguments = vars(parser.parse_args())
    run: dict[str, Callable[..., int]] = {
        "build-demo": _build_demo,
        "fetch": _fetch,
        "prepare": _prepare,
        "stats": _stats,
        "verify": _verify,
        "convert": _convert,
    }
    return run[arguments.pop("step")](**arguments)


def _build_demo() -> int:
    lock = demo.build(data_root())
    size = sum(entry.size or 0 for entry in lock.files)
    print(f"{data_root() / 'demo' / 'source'}: {len(lock.files)} shards, {size / 1e6:.1f} MB compressed")
    return 0


def _fetch(recipe: str, shard: list[str] | None) -> int:
    settings = DataSettings.read(recipe)
    lock = load_lock(settings.corpus, data_root())
    for name in shard or settings.corpus.shards:
        with Progress(f"fetch {name}", lock.entry(name).size, "B") as progress:
            receipt, skipped = fetch(settings.corpus, name, data_root(), progress.add)
        print(f"{name}: {receipt.size:,} bytes, sha256 {receipt.sha256}{' (up to date)' if skipped else ''}")
    return 0


def _prepare(recipe: str, shard: list[str] | None, events: bool) -> int:
    settings = DataSettings.read(recipe)
    lock = load_lock(settings.corpus, data_root())
    for name in shard or settings.corpus.shards:
        with Progress(f"prepare {name}", lock.entry(name).size, "B", events=events) as progress:
            done = prepare(settings, name, data_root(), progress.add)
        ledger = done.manifest["ledger"]
        if events:
            emit("result", shard=name, manifest=str(done.manifest_path), skipped=done.skipped, ledger=ledger)
            continue
        state = " (up to date)" if done.skipped else ""
        print(
            f"{name}: {ledger['kept']:,} documents, {ledger['blocks']:,} blocks, {done.manifest_path.parent}{state}"
        )
    return 0


def _stats(folder: Path) -> int:
    found = verify.manifests(folder)
    by_settings: dict[Path, list[dict[str, Any]]] = {}
    for path, manifest in found:
        check_laws(manifest["ledger"], str(path))
        shard = Path(manifest["made_from"]["input"]["shard"])
        by_settings.setdefault(path.parents[len(shard.parts)], []).append(manifest)
    for root, manifests in by_settings.items():
        print(f"{root}: {len(manifests)} shards")
        print(_account(total([manifest["ledger"] for manifest in manifests])))
    return 0


def _account(ledger: dict[str, Any]) -> str:
    """Write a ledger as text: the two laws, then a table of subsets."""

    def parts(counts: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"

    tokens = ledger["text_tokens"] + ledger["special_tokens"]
    lines = [
        f"  lines      {ledger['lines']:,} = {ledger['kept']:,} kept + {sum(ledger['dropped'].values()):,} dropped"
        f" + {sum(ledger['quarantined'].values()):,} quarantined",
        f"  dropped    {parts(ledger['dropped'])}",
        f"  quarantine {parts(ledger['quarantined'])}",
        f"  changed    {parts(ledger['cleaned'])}",
        f"  tokens     {tokens:,} = {ledger['blocks']:,} blocks x {ledger['length']:,} - {ledger['padding']:,} padding"
        f" ({ledger['text_tokens']:,} of text, {ledger['special_tokens']:,} special)",
        "",
        f"  {'subset':<28} {'documents':>10} {'MB of text':>11} {'tokens':>13} {'bytes/token':>12}",
    ]
    for name, counts in sorted(ledger["subsets"].items(), key=lambda item: -item[1]["bytes"]):
        ratio = counts["bytes"] / max(1, counts["tokens"])
        lines.append(
            f"  {name:<28} {counts['documents']:>10,} {counts['bytes'] / 1e6:>11.2f} {counts['tokens']:>13,} {ratio:>12.2f}"
        )
    return "\n".join(lines)


def _verify(folder: Path) -> int:
    found = verify.manifests(folder)
    faults = [fault for path, manifest in found for fault in verify.faults(path, manifest)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(f"{folder}: {len(found)} shards verified, {len(faults)} faults")
    return 2 if faults else 0


def _convert(folder: Path, out: Path, format: blocks.Format) -> int:
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{out} lies inside {folder}; choose a folder outside it")
    for path, manifest in verify.manifests(folder):
        target = out / path.parent.relative_to(folder)
        outputs = {}
        for name in block_files(manifest):
            final = (target / name).with_suffix(f".{format}")
            with write_aside(final) as aside:
                digest = blocks.convert(path.parent / name, aside, format)
                outputs[final.name] = {"size": aside.stat().st_size, "sha256": digest}
        write_json(
            target / "manifest.json", {**manifest, "converted_from": manifest["outputs"], "outputs": outputs}
        )
        print(f"{target}: {', '.join(outputs)}")
    return 0


if __name__ == "__main__":
    run_cli(main)
