"""``exporter``: adapters -> a model repository -> a running Triton."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.status import Status

from clipweld.exporter import tables
from clipweld.exporter.config import MODEL_NAME, Precision
from clipweld.exporter.errors import ExporterError, GateClosed, StoreMissing
from clipweld.trainer.adapters.folder import check_named
from clipweld.trainer.command_line import Given, WrongUsage, application, run
from clipweld.trainer.errors import TrainerError
from clipweld.trainer.extras import missing
from clipweld.trainer.files import check_surroundings
from clipweld.trainer.output import console, messages, print_json
from clipweld.trainer.output import printing as to_stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clipweld.exporter.checks.gate import Gate
    from clipweld.exporter.release.publish import Checks
    from clipweld.exporter.serving.servers import Found
    from clipweld.exporter.serving.switch import Switched
    from clipweld.exporter.store.repository import Repository
    from clipweld.trainer.adapters.adapter import Adapter
    from clipweld.trainer.base.backbone import Backbone
    from clipweld.trainer.tasks import Task

app = application(
    "exporter",
    """Merge adapters into CLIP, write Triton model repositories, serve them.

    Example: exporter merge --to onnx --model mini
    """,
)


def _check_name(_: type, name: str) -> None:
    if not re.fullmatch(MODEL_NAME, name):
        raise ValueError("letters, digits, - and _ only")


REPOSITORY = Path("model_repository")
FOR_A_VERSION = ("precision", "min_agreement", "min_accuracy", "max_drop", "validate", "data", "force")
PARITY_IMAGES = 16

Target = Literal["onnx", "open_clip", "transformers", "peft"]

RepositoryOption = Annotated[Path, Parameter(help="The Triton model repository.")]
NameOption = Annotated[str, Parameter(help="Common name of the three models.", validator=_check_name)]
UrlOption = Annotated[
    list[str] | None,
    Parameter(
        help="A server of it, by gRPC or http://; again for more. Left out: $CLIPWELD_URL, else those that exporter "
        "serve has started, and one on port 8001."
    ),
]
OfflineOption = Annotated[bool, Parameter(help="Look at the files alone, not for running servers.")]
TimeoutOption = Annotated[float, Parameter(validator=Number(gte=1), help="Seconds that loading may take.")]
JsonOption = Annotated[bool, Parameter(name="--json", help="Print JSON.")]


def main() -> None:
    """The console script: one line and status 1 for errors that have a reason; a bug keeps its traceback."""
    with messages():
        try:
            with to_stdout():
                check_surroundings(sys.argv[1:])
                run(app, sys.argv[1:])
                sys.exit(0)
        except (ExporterError, TrainerError) as exc:
            print(f"exporter: {' '.join(str(exc).split())}", file=sys.stderr)
            sys.exit(1)
        except ModuleNotFoundError as exc:
            print(f"exporter: {missing(exc, 'export')}", file=sys.stderr)
            sys.exit(1)


@app.command
def merge(
    *,
    to: Annotated[Target, Parameter(help="What to write: the next version, or the weights for another library.")],
    model: Annotated[
        str | None, Parameter(help="open_clip's name of the model, or mini; the adapters' if left out.")
    ] = None,
    pretrained: Annotated[
        str | None,
        Parameter(help="open_clip's tag, or a checkpoint file; the adapters', else the model's default if left out."),
    ] = None,
    adapters: Annotated[Path, Parameter(help="Folder of adapter files.")] = Path("adapters"),
    repository: RepositoryOption = REPOSITORY,
    name: NameOption = "clip",
    out: Annotated[Path | None, Parameter(help="Where to: a new folder; for open_clip also NAME.safetensors.")] = None,
    precision: Annotated[
        Precision, Parameter(help="What it computes in: fp16 is for GPUs, int8 for CPUs.")
    ] = Precision.fp32,
    min_agreement: Annotated[
        float,
        Parameter(
            validator=Number(gte=0, lte=1), help="Share of images on which a lower precision must answer as fp32 does."
        ),
    ] = 0.99,
    min_accuracy: Annotated[
        float | None, Parameter(validator=Number(gte=0, lte=100), help="Percent that every task must reach.")
    ] = None,
    max_drop: Annotated[
        float | None,
        Parameter(validator=Number(gte=0), help="Points that a task may lose against the version served now."),
    ] = None,
    validate: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            help="Measure both versions on a task's or folder's (NAME=FOLDER's) test images; again for more.",
        ),
    ] = None,
    data: Annotated[Path, Parameter(help="Where the MTIL data sets lie.")] = Path("data"),
    force: Annotated[bool, Parameter(help="Write it though it fails these, and record that.")] = False,
    unmerged: Annotated[
        bool,
        Parameter(
            help="Leave the adapters in the graph, to compare speed: model NAME-unmerged, whose version N has the "
            "first N of them, for 1, 4, 16, ... and all. Served beside NAME from the next start; replaces its last.",
        ),
    ] = False,
    as_json: JsonOption = False,
    given: Given = frozenset(),
) -> None:
    """Merge all adapters, in the order they were learned, and check the result before it counts.

    Version 1 of a repository is the base; each merge adds the next number. The first ones are served at once, later
    ones once they are promoted.

    Example: exporter merge --to onnx --model mini --max-drop 2
    """
    if (to == "onnx") != (out is None):
        raise WrongUsage("--out belongs to all that is not --to onnx, and must be given there.")
    if to != "onnx":
        _refuse(given, f"--to {to} writes no version", "repository", "name", "unmerged", *FOR_A_VERSION)
    elif unmerged:
        _refuse(given, "--unmerged is in fp32, without a gate", *FOR_A_VERSION)
    elif precision is Precision.fp32:
        _refuse(given, "fp32 is what a lower --precision must agree with", "min_agreement")
    if "adapters" in given:
        check_named(adapters)
    if out is not None:
        from clipweld.exporter.release.out import check_out

        check_out(to, out)
    from clipweld.trainer.base.hub import check_default_weights
    from clipweld.trainer.base.model_choice import choose_model, choose_weights

    model_name = choose_model(model, adapters)
    weights = choose_weights(pretrained, model_name, adapters)
    check_default_weights(model_name, weights)
    validation = _load_tasks(validate or [], data)
    from clipweld.trainer.adapters.adapter import load_lineage
    from clipweld.trainer.base.backbone import check_preprocessing, load_backbone

    with Console(stderr=True).status("loading weights") as status:
        backbone = load_backbone(model_name, weights)
        for note in backbone.notes:
            status.console.print(note, soft_wrap=True, markup=False, highlight=False)
        lineage = load_lineage(adapters, backbone.fingerprint)
        check_preprocessing(backbone, lineage)
        if out is not None:
            _merge_elsewhere(to, backbone, lineage, out, status, as_json)
        elif unmerged:
            _merge_unmerged(backbone, lineage, repository, name, status, as_json)
        else:
            from clipweld.exporter.checks.gate import Gate

            _check_prompts(validation, backbone)
            checks = _checks(Gate(min_accuracy, max_drop, min_agreement, force), lineage, validation, data)
            _merge_version(backbone, lineage, repository, name, precision, checks, status, as_json)


def _merge_elsewhere(
    to: Target, backbone: Backbone, lineage: list[Adapter], out: Path, status: Status, as_json: bool
) -> None:
    from clipweld.exporter.release.checkpoints import save

    status.update("merging")
    loads, step = save(to, backbone, lineage, out)
    tasks = [adapter.task for adapter in lineage]
    result = {"out": str(out), "model": loads, "tasks": tasks, "load": step}
    _print(result, as_json, f"{out}: {tables.learned(tasks)}. Load it with: {step}")


def _merge_unmerged(
    backbone: Backbone, lineage: list[Adapter], folder: Path, name: str, status: Status, as_json: bool
) -> None:
    from clipweld.exporter.release.unmerged import release_unmerged
    from clipweld.exporter.store.repository import Repository
    from clipweld.trainer.tasks import sample

    apart = release_unmerged(backbone, lineage, Repository(folder, name), *sample(PARITY_IMAGES), status.update)
    _print(apart.to_dict(), as_json, f"{folder}: {tables.unmerged(apart)}")


def _merge_version(
    backbone: Backbone,
    lineage: list[Adapter],
    folder: Path,
    name: str,
    precision: Precision,
    checks: Checks,
    status: Status,
    as_json: bool,
) -> None:
    from clipweld.exporter.release.publish import release
    from clipweld.exporter.serving.announcement import announcements
    from clipweld.exporter.store.repository import Repository
    from clipweld.trainer.tasks import sample

    samples = sample(PARITY_IMAGES)
    try:
        released = release(
            backbone, lineage, Repository(folder, name), *samples, status.update, precision=precision, checks=checks
        )
    except GateClosed as exc:
        status.stop()
        Console(stderr=True).print(tables.accuracy_table(exc.accuracies, exc.agreements))
        raise
    status.stop()
    agreements = released.cast.agreement if released.cast else ()
    if not as_json and (released.accuracy or agreements):
        console().print(tables.accuracy_table(released.accuracy, agreements))
    tasks = [adapter.task for adapter in lineage]
    line = tables.released(released, tasks, servers_run=bool(announcements(folder)))
    _print(released.to_dict(), as_json, f"{folder}: {line}")


@app.command
def serve(
    command: Annotated[list[str] | None, Parameter(metavar="-- COMMAND...", help="Serve while it runs.")] = None,
    /,
    *,
    repository: RepositoryOption = REPOSITORY,
    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535), help="gRPC port; 0 takes free ports.")] = 8001,
    http_port: Annotated[
        int | None,
        Parameter(
            validator=Number(gte=0, lte=65535),
            help="HTTP port; 0 takes a free one, as leaving it out with --port 0 does.",
            show_default="8000",
        ),
    ] = None,
    timeout: TimeoutOption = 120.0,
    restart: Annotated[
        bool, Parameter(help="Start another Triton where one ends by itself, twice in ten minutes.")
    ] = False,
    verbose: Annotated[bool, Parameter(name=("--verbose", "-v"), help="Show Triton's log.")] = False,
) -> None:
    """Run a local Triton on loopback until Ctrl-C, or while COMMAND runs, and exit with its status.

    COMMAND finds the server in CLIPWELD_URL (gRPC) and CLIPWELD_HTTP_URL. Only those may switch versions who have the
    repository's key, in CLIPWELD_ADMIN_KEY or in its store: exporter promote and rollback send it.

    Example: exporter serve --port 0 -- client classify samples/seven.png --labels "the number seven, a shoe"
    """
    from clipweld.exporter.serving.triton import find_command, run_beside, wait_until_stopped
    from clipweld.exporter.serving.triton import serve as serve_triton
    from clipweld.exporter.store.repository import repositories

    console = Console(stderr=True)
    found = repositories(repository)
    versions = {r.name: r.standing() for r in found}
    for path, reason in [item for r in found for item in r.foreign_versions().items()]:
        console.print(f"foreign, and loaded too: {path} ({reason})", highlight=False, soft_wrap=True, markup=False)
    if command:
        find_command(command)
    signal.signal(signal.SIGTERM, _terminate)

    def say(line: str) -> None:
        with suppress(OSError, ValueError):  # nobody reads any more
            print(line, file=sys.stderr, flush=True)

    def log(line: str) -> None:
        if verbose:
            say(line)

    ports = {"port": port, "http_port": http_port if http_port is not None else 8000 if port else 0}
    try:
        with serve_triton(repository, **ports, timeout_s=timeout, restart=restart, log=log, report=say) as server:
            served = ", ".join(f"{name} {', '.join(map(str, numbers))}" for name, numbers in versions.items())
            text = f"{server.url} and {server.http_url}: {served}; {server.description}"
            console.print(text, highlight=False, soft_wrap=True)
            if command:
                raise SystemExit(run_beside(server, command))
            console.print("Ctrl-C stops it", highlight=False)
            wait_until_stopped(server)
    except KeyboardInterrupt:
        raise SystemExit(0) from None


@app.command
def install_server(
    *,
    python: Annotated[
        str | None, Parameter(metavar="PATH", help="Python 3.10 to 3.12 to make it with; found if left out.")
    ] = None,
    wheels: Annotated[
        Path | None,
        Parameter(name="--from", metavar="FOLDER", help="Folder of wheels, instead of pip's package index."),
    ] = None,
    cuda: Annotated[bool, Parameter(help="With CUDA's libraries (3 GB), for models on a GPU.")] = False,
) -> None:
    """Install Triton, in an environment of its own beside clipweld's packages.

    Only exporter serve needs it, and not where a tritonserver with NVIDIA's onnxruntime backend is on PATH. Packages
    are pinned, and checked against their hashes. It is removed with the environment that clipweld is installed in.

    Example: exporter install-server
    """
    from clipweld.exporter.serving import server_environment as server

    if wheels is not None and not wheels.is_dir():
        raise WrongUsage(f"--from {wheels}: no such folder.")
    has_cuda = server.has_cuda()
    if python is None and has_cuda is not None and (has_cuda or not cuda):
        print(f"{server.FOLDER}: is there already")
        return
    chosen = server.choose_python(python, cuda=cuda)
    with Console(stderr=True).status(f"installing Triton for Python {chosen.version} in {server.FOLDER}"):
        found = server.install(chosen, wheels, cuda=cuda)
    print(f"{server.FOLDER}: Triton, run by Python {found.version}. Next: exporter serve")


@app.command
def versions(
    *,
    repository: RepositoryOption = REPOSITORY,
    url: UrlOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show every version: learned tasks, base, origin, whether it is served.

    The table shows the files; the versions that running servers have loaded are printed below it and in the JSON.
    What clipweld did not write is listed as foreign: no command touches it.

    Example: exporter versions
    """
    from clipweld.exporter.serving.switch import loaded_versions
    from clipweld.exporter.store.foreign import foreign_entries
    from clipweld.exporter.store.repository import known_repositories

    found = known_repositories(repository)
    rows = [row for r in found for row in (*tables.summaries(r), *map(tables.foreign_summary, foreign_entries(r)))]
    servers = _servers(found, url, offline)
    loaded = {(r.name, address): loaded_versions(r, address) for r in found for address in servers.urls}
    for row in rows:
        having = {a: numbers for (name, a), numbers in loaded.items() if name == row["model"]}
        row["loaded_on"] = [a for a, numbers in having.items() if row["version"] in numbers and not row["foreign"]]
        row["newest_on"] = [a for a in row["loaded_on"] if having[a][-1] == row["version"]]
    if as_json:
        print_json(rows)
        return
    console().print(tables.versions_table(rows))
    for one in found if servers.urls else ():
        for address in servers.urls:
            print(tables.running(one, address, loaded[one.name, address]))
    if not servers.urls:
        print(servers.nowhere)
    for one in found:
        try:
            one.check_store()
        except StoreMissing as exc:
            print(f"exporter: {exc}", file=sys.stderr)


@app.command
def verify(
    version: Annotated[int | None, Parameter(help="Which one; all of them if left out.")] = None,
    /,
    *,
    repository: RepositoryOption = REPOSITORY,
    name: NameOption = "clip",
    url: UrlOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prove versions again: files unaltered, graph the base's own, answers PyTorch's. Needs no adapters.

    Example: exporter verify 2
    """
    from clipweld.exporter.checks.verify import verify as verify_version
    from clipweld.exporter.serving.switch import loaded_versions
    from clipweld.exporter.store.repository import Repository
    from clipweld.trainer.tasks import sample

    found = Repository(repository, name)
    found.check_released()
    numbers = [version] if version is not None else found.versions()
    servers = _servers([found], url, offline)
    loaded = {address: loaded_versions(found, address) for address in servers.urls}
    on = {number: [address for address in loaded if number in loaded[address]] for number in numbers}
    images, prompts = sample(PARITY_IMAGES)
    with Console(stderr=True).status("verifying"):
        results = [verify_version(found, number, images, prompts) for number in numbers]
    lines = [
        f"{name} version {result.version}: files unaltered, ONNX Runtime is within "
        f"{result.parity.max_abs:.1e} of PyTorch"
        + (f", as served {result.cast.max_abs:.1e}" if result.cast else "")
        + (f"; loaded on {', '.join(on[result.version])}" if on[result.version] else "")
        for result in results
    ]
    lines += [] if servers.urls else [servers.nowhere]
    proven = [result.to_dict() | {"loaded_on": on[result.version]} for result in results]
    _print(proven, as_json, "\n".join(lines))


@app.command
def promote(
    version: Annotated[
        int | None, Parameter(help="Which one; the newest if left out. exporter versions shows them.")
    ] = None,
    /,
    *,
    repository: RepositoryOption = REPOSITORY,
    name: NameOption = "clip",
    url: UrlOption = None,
    offline: OfflineOption = False,
    timeout: TimeoutOption = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Serve a version, on disk and in running Tritons, without losing a request.

    The version served so far serves on until the new one is loaded and warm, and stays loaded for the way back.

    Example: exporter promote 3
    """
    from clipweld.exporter.serving.switch import promote as promote_version
    from clipweld.exporter.store.repository import Repository

    found = Repository(repository, name)
    found.check_released()
    with Console(stderr=True).status("promoting") as status:
        servers = _servers([found], url, offline, timeout).all_reached()
        result = promote_version(found, version, servers.urls, timeout_s=timeout, report=status.update)
    _print_switched(result, servers, as_json)


@app.command
def rollback(
    *,
    repository: RepositoryOption = REPOSITORY,
    name: NameOption = "clip",
    url: UrlOption = None,
    offline: OfflineOption = False,
    timeout: TimeoutOption = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Serve what was served before; once more for the one before that.

    Example: exporter rollback
    """
    from clipweld.exporter.serving.switch import rollback as roll_back
    from clipweld.exporter.store.repository import Repository

    found = Repository(repository, name)
    found.check_released()
    with Console(stderr=True).status("rolling back") as status:
        servers = _servers([found], url, offline, timeout).all_reached()
        result = roll_back(found, servers.urls, timeout_s=timeout, report=status.update)
    _print_switched(result, servers, as_json)


@app.command
def prune(
    *,
    keep: Annotated[int, Parameter(validator=Number(gte=1), help="How many of the newest versions to keep.")],
    repository: RepositoryOption = REPOSITORY,
    name: NameOption = "clip",
    url: UrlOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete old versions for good; never one that is active or that a running server has loaded, nor the base.

    Example: exporter prune --keep 3
    """
    from clipweld.exporter.serving.switch import prune as prune_versions
    from clipweld.exporter.store.repository import Repository

    found = Repository(repository, name)
    found.check_released()
    servers = _servers([found], url, offline).all_reached()
    result = prune_versions(found, keep, servers.urls)
    removed, kept = (", ".join(map(str, numbers)) or "none" for numbers in (result.removed, result.kept))
    asked = f"what is loaded on {', '.join(servers.urls)} was kept" if servers.urls else servers.nowhere
    _print(result.to_dict() | _search(servers), as_json, f"{name}: removed {removed}; kept {kept}; {asked}")


def _refuse(given: frozenset[str], why: str, *names: str) -> None:
    """Options that would change nothing are wrong usage."""
    if useless := [f"--{name.replace('_', '-')}" for name in names if name in given]:
        raise WrongUsage(f"{why}; leave out {', '.join(useless)}.")


def _load_tasks(names: Sequence[str], data: Path) -> list[Task]:
    """Tasks to measure versions on; says what each is made of, and what about it a user should look at."""
    from clipweld.trainer.tasks import load_tasks, summarise

    tasks = load_tasks(names, data)
    for task in tasks:
        for line in summarise(task).lines():
            print(line, file=sys.stderr)
    return tasks


def _check_prompts(tasks: Sequence[Task], backbone: Backbone) -> None:
    """Say what a user should know of how the model reads the tasks' prompts.

    Raises:
        TaskInvalid: it can't tell two classes apart.
    """
    from clipweld.trainer.tasks import check_prompts

    for task in tasks:
        for warning in check_prompts(task, backbone.tokenizer):
            print(f"warning: {task.name}: {warning}", file=sys.stderr)


def _checks(gate: Gate, lineage: Sequence[Adapter], validation: Sequence[Task], data: Path) -> Checks:
    """Return the gate that a version must pass, on the given tasks and on those that it has learned."""
    from clipweld.exporter.release.publish import Checks
    from clipweld.trainer.tasks import find_learned, shipped_tasks

    learned = [task for adapter in lineage if (task := find_learned(adapter, data))]
    return Checks(gate, validation, compared_on=[*validation, *learned] or shipped_tasks())


def _servers(repositories: Sequence[Repository], urls: list[str] | None, offline: bool, wait_s: float = 0) -> Found:
    """The servers of a repository: those that were named, else those that are found, unless files alone are wanted."""
    from clipweld.exporter.serving.servers import Found, find_servers

    if offline and urls:
        raise WrongUsage("--offline looks for no server; leave out --url.")
    if offline:
        return Found([], [], offline=True)
    named = urls or [url for url in [os.environ.get("CLIPWELD_URL")] if url]
    found = Found(named, []) if named else find_servers(repositories, wait_s)
    for reason in found.out_of_reach:
        print(f"exporter: {reason}", file=sys.stderr)
    return found


def _search(found: Found) -> dict:
    """The search for servers, as JSON has it."""
    return {"servers": found.urls, "looked": found.looked, "offline": found.offline}


def _print_switched(result: Switched, found: Found, as_json: bool) -> None:
    for warning in result.warnings:
        print(f"exporter: warning: {warning}", file=sys.stderr)
    _print(result.to_dict() | _search(found), as_json, tables.switched(result, found))


def _print(result: dict | list, as_json: bool, line: str) -> None:
    if as_json:
        print_json(result)
    else:
        print(line)


def _terminate(signum: int, frame: object) -> None:
    """SIGTERM is an orderly end: unwind, so that Triton is stopped."""
    raise SystemExit(128 + signum)
