"""The data steps by hand, without Prefect:  python -m corpora STEP --help"""

import argparse
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpora import account, blocks, card, demo, estimate, explain, sample, sources, train_tokenizer, verify
from corpora.errors import EXIT_INPUT, InputError, PilelineError, of_the_system, run_cli
from corpora.fetch import fetch
from corpora.files import data_root, write_aside, write_json
from corpora.ledger import check_laws, total
from corpora.lock import built_in, load_lock
from corpora.parallel import cores, each
from corpora.part import part_of
from corpora.patience import Patience
from corpora.prepare import MODEL, Prepared, beside, block_files, prepare
from corpora.progress import Progress, emit, log_above_bars, printable, say
from corpora.receipts import Receipt, raw_path, read_receipt
from corpora.settings import DEPLOYMENTS, Corpus, DataSettings, read_toml, recipe_path


def main() -> int:
    """Parse the command line and run one step; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m corpora",
        description="Turn text shards into blocks of token ids, step by step. RECIPE is a name in deployments/ "
        "(demo, 13m, 2b, ...) or a path ending in .toml. Data goes to $PILELINE_DATA (default: data/).",
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")

    steps.add_parser("build-demo", help="build the demo corpus from the Python on this machine")

    step = steps.add_parser("list", help="show the corpora and recipes there are, or the shards of one")
    step.add_argument("name", metavar="CORPUS|RECIPE", nargs="?")

    step = steps.add_parser(
        "lock",
        help="ask for the sizes and hashes of a corpus' files, and write its lock",
        description="Ask the Hugging Face API, a server or a folder for sizes and sha256, and write the lock beside "
        "the corpus' TOML. What the old lock knows is a pin: figures that contradict it stop the step.",
    )
    step.add_argument("corpus", metavar="CORPUS", help="a built-in corpus, or a path ending in .toml")
    step.add_argument("--out", type=Path, help="write the lock here; default: beside the TOML")

    step = steps.add_parser("estimate", help="tell a recipe's bytes, documents, tokens, disk and hours")
    step.add_argument("recipe", metavar="RECIPE")

    step = steps.add_parser(
        "fetch",
        help="download and verify a recipe's shards, or go on where the last time ended",
        description="Download and verify a recipe's shards, or go on where the last time ended. "
        "Exit code 2: something is wrong and stays so; 75: run again later.",
    )
    step.add_argument("recipe", metavar="RECIPE")
    step.add_argument(
        "--shard", action="append", help="only this shard (may be given again); default: all of the recipe"
    )
    step.add_argument("--parallel", type=int, default=4, help="shards at the same time (default: 4)")
    step.add_argument(
        "--patience",
        type=float,
        default=Patience().total / 60,
        metavar="MINUTES",
        help="go on for so long without any progress, once something has come (default: %(default)g)",
    )

    step = steps.add_parser(
        "sample", help="show what cleaning would do to a fetched shard, and write nothing"
    )
    step.add_argument("recipe", metavar="RECIPE")
    step.add_argument("--shard", help="default: the recipe's first")
    step.add_argument(
        "--documents", type=_natural, default=2000, help="look at so many (default: %(default)s)"
    )
    step.add_argument(
        "--examples", type=_natural, default=3, help="show so many for each rule (default: %(default)s)"
    )

    step = steps.add_parser(
        "train-tokenizer", help="train the SentencePiece model that a recipe's [tokenizer.train] asks for"
    )
    step.add_argument("recipe", metavar="RECIPE")
    step.add_argument("--events", action="store_true", help="report progress and result as JSON lines")

    step = steps.add_parser("prepare", help="clean, tokenize and pack fetched shards into blocks")
    step.add_argument("recipe", metavar="RECIPE")
    step.add_argument(
        "--shard", action="append", help="only this shard (may be given again); default: all of the recipe"
    )
    step.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="worker processes, over all shards that are prepared at the same time (default: %(default)s, the cores)",
    )
    step.add_argument("--events", action="store_true", help="report progress and result as JSON lines")

    step = steps.add_parser("stats", help="show the ledger of prepared shards")
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with prepared shards under it")

    step = steps.add_parser(
        "explain", help="tell which documents a block is made of, and where they come from"
    )
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with prepared shards under it")
    step.add_argument("block", metavar="BLOCK", type=int, help="its number under DIR, from 0")
    step.add_argument(
        "--characters",
        type=_natural,
        default=200,
        help="of each text, from both its ends (default: %(default)s)",
    )

    step = steps.add_parser("verify", help="hash fetched and prepared shards anew, and recount the blocks")
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with such shards under it")
    step.add_argument("--deep", action="store_true", help="decode every document, not a sample of each part")

    step = steps.add_parser("convert", help="write prepared blocks in the other format")
    step.add_argument("folder", metavar="DIR", type=Path, help="any folder with prepared shards under it")
    step.add_argument("out", metavar="OUT", type=Path, help="new folder; it gets the same layout")
    step.add_argument("--format", choices=("arrow", "parquet"), default="parquet", help="default: parquet")

    arguments = vars(parser.parse_args())
    run: dict[str, Callable[..., int]] = {
        "build-demo": _build_demo,
        "list": _list,
        "lock": _lock,
        "estimate": _estimate,
        "fetch": _fetch,
        "sample": _sample,
        "train-tokenizer": _train_tokenizer,
        "prepare": _prepare,
        "stats": _stats,
        "explain": _explain,
        "verify": _verify,
        "convert": _convert,
    }
    return run[arguments.pop("step")](**arguments)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0")
    return int(text)


def _build_demo() -> int:
    lock = demo.build(data_root())
    size = sum(entry.size or 0 for entry in lock.files)
    print(f"{data_root() / 'demo' / 'source'}: {len(lock.files)} shards, {size / 1e6:.1f} MB compressed")
    return 0


def _list(name: str | None) -> int:
    if name is None:
        print("corpora: ", ", ".join(built_in()))
        print("recipes: ", ", ".join(sorted(path.stem for path in DEPLOYMENTS.glob("*.toml"))))
        return 0
    data = data_root()
    if name in built_in():
        corpus = Corpus(name=name, train=("x",), val=("y",))
        shards: tuple[str, ...] = ()
    else:
        corpus = DataSettings.read(name).corpus
        shards = corpus.shards
    lock = load_lock(corpus, data)
    print(f"{lock.corpus}: {lock.base}")
    for entry in lock.files if not shards else map(lock.entry, shards):
        file = raw_path(corpus.name, entry.name, entry.path, data)
        receipt, part = read_receipt(file), part_of(file)
        state = "not here"
        if file.is_file():
            stat = file.stat()
            known = receipt and (receipt.sha256, receipt.size, receipt.mtime_ns)
            state = (
                "here"
                if known == (entry.sha256, stat.st_size, stat.st_mtime_ns)
                else "here, not checked since it was changed"
            )
        elif part.is_file():
            state = f"{part.stat().st_size:,} bytes of it here"
        size = f"{entry.size:,}" if entry.size else f"about {entry.about:,}" if entry.about else "not known"
        digest = entry.sha256[:16] if entry.sha256 else "not known yet"
        trust = "" if entry.pinned or not entry.sha256 else " (first use)"
        print(f"  {entry.name:<12} {size:>21} bytes  sha256 {digest}{trust}  {state}")
    return 0


def _lock(corpus: str, out: Path | None) -> int:
    toml, beside = sources.find(corpus)
    final = out or beside
    if final.exists() and (final.is_symlink() or not final.is_file()):
        raise InputError(f"{final}: is not a plain file; choose another place for the lock")
    lock = sources.make_lock(toml, [beside, final], data_root(), print)
    written = lock.model_dump(exclude_defaults=True)
    if lock.url == final.resolve().parent.as_uri():
        written["url"] = "."
    write_json(final, written)
    unknown = sum(entry.sha256 is None for entry in lock.files)
    told = f", {unknown} without a sha256: the first download of these will be trusted" if unknown else ""
    size = sum(entry.size or entry.about or 0 for entry in lock.files)
    print(f"{final}: {len(lock.files)} shards, {size:,} bytes{told}")
    return 0


def _estimate(recipe: str) -> int:
    settings, data = DataSettings.read(recipe), data_root()
    found = estimate.estimate(settings, data)
    shards = found.shards
    about = "" if all(shard.prepared for shard in shards) else "about "
    exact = "" if all(shard.known for shard in shards) else "about "
    speed, told = estimate.measure_speed(settings, data)
    if not speed:
        raise InputError(f"{recipe}: no document in {told}; does [corpus] text_field fit it?")
    hours = found.text_to_prepare / speed / 3600
    free = estimate.free_bytes(data)
    print(
        f"shards     {len(shards)}, {exact}{sum(shard.raw for shard in shards):,} bytes; "
        f"{exact}{found.download:,} to download\n"
        f"text       {about}{sum(shard.text for shard in shards):,} bytes, "
        f"{about}{sum(shard.documents for shard in shards):,} documents\n"
        f"tokens     {about}{sum(shard.tokens for shard in shards):,}\n"
        f"disk       about {found.download + found.blocks:,} bytes more (blocks: {found.blocks:,}); {free:,} are free\n"
        f"prepare    {_duration(hours)} of one core, {_duration(hours / cores())} on the {cores()} of this machine "
        f"({speed / 1e6:.1f} MB of text per CPU second, measured on {told})"
    )
    sys.stdout.flush()
    if "model" not in read_toml(recipe_path(recipe)):
        return 0
    # The model's half, by the room that knows models and torch.
    return subprocess.run([sys.executable, "-m", "models", "estimate", recipe], check=False).returncode


def _duration(hours: float) -> str:
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{hours * 60:.1f} min"
        if hours * 60 >= 1
        else f"{hours * 3600:.1f} s"
    )


def _fetch(recipe: str, shard: list[str] | None, parallel: int, patience: float) -> int:
    if parallel < 1 or not patience > 0:
        raise InputError("--parallel and --patience are numbers above 0")
    settings, data = DataSettings.read(recipe), data_root()
    corpus, lock = settings.corpus, load_lock(settings.corpus, data)
    names = tuple(shard or corpus.shards)
    found = estimate.estimate(settings, data, names)
    if found.download:
        about = "" if all(s.known for s in found.shards) else "about "
        print(
            f"{len(names)} shards: {about}{found.download:,} bytes to download, about {found.blocks:,} more for "
            f"their blocks; {estimate.free_bytes(data):,} are free",
            file=sys.stderr,
        )
    if warning := estimate.check_space(found, data, prepare=False):
        print(f"warning: {warning}", file=sys.stderr)

    def one(name: str) -> tuple[Receipt, bool]:
        entry = lock.entry(name)
        with Progress(f"fetch {name}", entry.size or entry.about, "B") as progress:
            return fetch(corpus, name, data, progress.add, Patience(total=patience * 60))

    log_above_bars()
    failed: list[PilelineError] = []
    for name, result in each(names, one, parallel):
        if isinstance(result, PilelineError):
            failed.append(result)
            say(f"error: {result}", sys.stderr)
            continue
        receipt, skipped = result
        trust = " (trusted on first use)" if receipt.trust == "first use" else ""
        say(
            f"{name}: {receipt.size:,} bytes, sha256 {receipt.sha256}{trust}{' (up to date)' if skipped else ''}"
        )
    final = [error for error in failed if isinstance(error, InputError)] or failed
    return final[0].exit_code if final else 0


def _sample(recipe: str, shard: str | None, documents: int, examples: int) -> int:
    settings = DataSettings.read(recipe)
    for line in sample.sample(settings, shard or settings.corpus.shards[0], data_root(), documents, examples):
        print(printable(line))
    return 0


def _train_tokenizer(recipe: str, events: bool) -> int:
    settings = DataSettings.read(recipe)
    if settings.tokenizer.train is None:
        raise InputError(f"{recipe}: has no [tokenizer.train]; its tokenizer is given, not trained")
    with Progress("tokenizer", settings.tokenizer.train.bytes, "B", events=events) as progress:
        done = train_tokenizer.train(settings, data_root(), progress.add)
    if events:
        emit("result", model=str(done.model), skipped=done.skipped, manifest=done.manifest)
    else:
        print(f"{done.model}{' (up to date)' if done.skipped else ''}")
    return 0


def _prepare(recipe: str, shard: list[str] | None, workers: int, events: bool) -> int:
    if workers < 1:
        raise InputError("--workers is a number above 0")
    settings, data = DataSettings.read(recipe), data_root()
    lock, names = load_lock(settings.corpus, data), shard or settings.corpus.shards

    def one(name: str) -> Prepared:
        with Progress(f"prepare {name}", lock.entry(name).size, "B", events=events) as progress:
            try:
                return prepare(settings, name, data, progress.add, workers)
            except OSError as error:  # of one shard; the others go on
                raise of_the_system(error) from None

    log_above_bars()
    failed: list[PilelineError] = []
    done = None
    # As many shards at a time as workers: small ones are made side by side, a large one takes them all.
    for name, result in each(names, one, min(workers, len(names))):
        if isinstance(result, PilelineError):
            failed.append(result)
            say(f"error: {result}", sys.stderr)
            continue
        done, ledger = result, result.manifest["ledger"]
        if events:
            path = str(result.manifest_path)
            emit("result", shard=name, manifest=path, skipped=result.skipped, ledger=ledger)
            continue
        state = " (up to date)" if result.skipped else ""
        say(
            f"{name}: {ledger['kept']:,} documents, {ledger['blocks']:,} blocks, {result.manifest_path.parent}{state}"
        )
    if done is not None and not events:
        card.update(settings, beside(done))
    final = [error for error in failed if isinstance(error, InputError)] or failed
    return final[0].exit_code if final else 0


def _stats(folder: Path) -> int:
    by_settings: dict[Path, list[dict[str, Any]]] = {}
    for path, manifest in verify.manifests(folder):
        check_laws(manifest["ledger"], str(path))
        by_settings.setdefault(beside(Prepared(path, manifest, skipped=True)), []).append(manifest)
    for root, manifests in by_settings.items():
        engines = total([{"length": 0, **m.get("engines", {})} for m in manifests])
        used = ", ".join(f"{name} ({count} parts)" for name, count in sorted(engines.items()) if " " in name)
        print(f"{root}: {len(manifests)} shards, encoded by {used}")
        print(account.text(total([manifest["ledger"] for manifest in manifests])))
    return 0


def _explain(folder: Path, block: int, characters: int) -> int:
    for line in explain.explain(verify.manifests(folder), block, characters):
        print(printable(line))
    return 0


def _verify(folder: Path, deep: bool) -> int:
    fetched, prepared = verify.fetched(folder), verify.manifest_paths(folder)
    if not fetched and not prepared:
        raise InputError(f"{folder}: neither a fetched nor a prepared shard under it")
    faults = 0
    for fault in itertools.chain(
        *map(verify.raw_faults, fetched),
        *(verify.faults(path, deep) for path in prepared),
    ):
        faults += 1
        print(f"error: {fault}", file=sys.stderr)
    print(f"{folder}: {len(fetched)} fetched and {len(prepared)} prepared shards verified, {faults} faults")
    return EXIT_INPUT if faults else 0


def _convert(folder: Path, out: Path, format: blocks.Format) -> int:
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{out} lies inside {folder}; choose a folder outside it")
    found = verify.manifests(folder)
    roots = {beside(Prepared(*one, skipped=True)): one[1]["made_from"]["blocks"]["format"] for one in found}
    for root in roots:
        if not root.resolve().is_relative_to(folder.resolve()):
            raise InputError(
                f"{folder} is one shard of {root}; convert that folder, which has what belongs to all"
            )
    for path, manifest in found:
        target = out / path.parent.relative_to(folder)
        outputs = {}
        for name, output in manifest["outputs"].items():
            source, final = path.parent / name, target / name
            is_blocks = name in block_files(manifest)
            if is_blocks:
                final = final.with_suffix(f".{format}")
            with write_aside(final) as aside:
                if is_blocks:
                    digest = blocks.convert(source, aside, format)
                    output = {"size": aside.stat().st_size, "sha256": digest}
                else:
                    shutil.copyfile(source, aside)
            outputs[final.name] = output
        write_json(
            target / "manifest.json", {**manifest, "converted_from": manifest["outputs"], "outputs": outputs}
        )
        print(f"{target}: {', '.join(name for name in outputs if name.startswith('part-'))}")
    for root in roots:
        for name in (MODEL, card.NAME):
            if (root / name).is_file():
                with write_aside(out / root.relative_to(folder) / name) as aside:
                    text = (root / name).read_bytes()
                    if name == card.NAME:  # the card says which files are which split
                        text = re.sub(rb"part-\*\.(arrow|parquet)", b"part-*." + format.encode(), text)
                    aside.write_bytes(text)
    return 0


if __name__ == "__main__":
    run_cli(main)
