"""Print the table of TRUST.md: each promise, how it is tested, and the results of the recorded run.

Run: python -m evidence.trust.table evidence/records/trust
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence.markdown import table


@dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        promise: what clipweld promises.
        test: how the command tries to break it.
        record: name of the command's module and of its record.
        found: describes the figures of the record.
    """

    promise: str
    test: str
    record: str
    found: Callable[[dict[str, Any]], str]


def judged(figures: dict[str, Any], kind: str) -> str:
    """Describe how many files of a kind were accepted and refused."""
    outcomes = figures["by_kind"][kind]["outcomes"]
    total, accepted = sum(outcomes.values()), outcomes.get("accepted", 0)
    return f"{total:,}: {total - accepted:,} refused, {accepted:,} accepted as they are"


def others(figures: dict[str, Any]) -> str:
    """Describe the files of all kinds but adapters and manifests."""
    rest = {kind: each for kind, each in figures["by_kind"].items() if kind not in ("adapters", "manifests")}
    total = sum(sum(each["outcomes"].values()) for each in rest.values())
    return f"{total:,} of {len(rest)} kinds, as promised"


def memory(figures: dict[str, Any]) -> str:
    """Describe the most memory and time that any file took."""
    extra = {kind: each["extra_mb"] for kind, each in figures["by_kind"].items()}
    longest = max(each["longest_s"] for each in figures["by_kind"].values())
    adapter, manifest = extra.pop("adapters"), extra.pop("manifests")
    worst = max(extra, key=extra.get)
    return (
        f"beyond twice the file, an adapter took at most {adapter:.0f} MB, a manifest {manifest:.1f} MB, "
        f"any other kind {extra[worst]:.0f} MB ({worst}); "
        f"at most {longest:.1f} s, in {figures['files']:,} files; {figures['atheris']['files']:,} more by atheris"
    )


def on_disks(figures: dict[str, Any]) -> str:
    """Describe how many commands ran on disks that were too small."""
    cases = {name: row for name, row in figures.items() if isinstance(row, dict)}
    refused = sum(row.get("refused", 0) for row in cases.values())
    return f"{figures['runs']:,} runs of {len(cases)} commands, {refused:,} refused; all ended the same with room"


def faulty(figures: dict[str, Any]) -> str:
    """Describe how calls ended while the server had faults."""
    failed = sum(figures["failures"].values())
    return (
        f"{figures['calls']:,} calls under {len(figures['faults'])} faults: {figures['right']:,} right, {failed:,} "
        f"refused with an error of their kind, {figures['wrong']} wrong, {figures['foreign']} foreign errors, "
        f"{figures['overdue']} late; back by itself within {figures['recovery_s_max']:.1f} s"
    )


def killed(*commands: str) -> Callable[[dict[str, Any]], str]:
    """Return a function that describes the kills of some commands."""

    def found(figures: dict[str, Any]) -> str:
        rows = [figures[command] for command in commands]
        kills, again = (sum(row[key] for row in rows) for key in ("kills", "of runs that went on after a kill"))
        half = sum(row["found"].get("half of it", 0) for row in rows)
        return f"{kills} kills, {half} half-way, {again} of runs that had been killed before; all ended the same"

    return found


def slope(figures: dict[str, Any], who: str) -> str:
    """Describe how memory changes over time."""
    row = figures["growth"][f"{who} mb"]
    return f"{row['an_hour']:+.1f} MB an hour [{row['low']:+.1f}, {row['high']:+.1f}] of {row['median']:.0f}"


ROWS = (
    Row(
        "An adapter from an untrusted source is taken for what it says, or refused in one line",
        "bytes and fields changed, hashes made anew to fit; atheris looks for new paths",
        "files",
        lambda f: judged(f, "adapters"),
    ),
    Row("So is a manifest", "the same", "files", lambda f: judged(f, "manifests")),
    Row(
        "So are checkpoints, cards, ONNX files, histories, records, results, folders of images, names",
        "the same; pickles, TorchScript, links, FIFOs, `../`, zip bombs. An audit hook sees each file opened, each "
        "program started",
        "files",
        others,
    ),
    Row(
        "No memory for what a file claims to hold, no hang",
        "workers with a limit, watched; short values are larger in memory than as JSON",
        "files",
        memory,
    ),
    Row(
        "A damaged image gives an answer or an error with its name, the same in client and trainer",
        "JPEG, PNG, WebP, GIF, TIFF and more, damaged in bytes, headers and chunks; bombs",
        "images",
        lambda f: (
            f"{f['files']['read'] + f['files']['refused']:,}: {f['files']['read']:,} read alike, "
            f"{f['files']['refused']:,} refused by both, {f['files'].get('unsteady', 0)} damaged faxes "
            f"that libtiff itself reads differently each time; at most {f['files']['most_memory_mb']:,.0f} MB; "
            f"{f['commands']['files']} of them through `client classify` and `trainer fit`"
        ),
    ),
    Row(
        "Training survives kill -9: what was learned stays, `--resume` ends with the same bytes",
        "`fit` and `sequence` killed at random moments, up to three times each",
        "kills",
        killed("trainer fit", "trainer sequence"),
    ),
    Row(
        "So do releases: a version is there whole or not at all, the same command ends the same",
        "`merge`, `promote` on a running server and `prune` killed likewise",
        "kills",
        killed("exporter merge", "exporter promote", "exporter prune"),
    ),
    Row(
        "So do folders of answers: none lost, none twice",
        "`classify FOLDER --out` killed likewise",
        "kills",
        killed("client classify"),
    ),
    Row(
        "A killed server leaves no process, memory or folder that the next one doesn't remove",
        "`serve` killed likewise",
        "kills",
        killed("exporter serve"),
    ),
    Row(
        "On a full or read-only disk: one line, nothing half-written, what was there stays",
        "every command that writes, on disks of many sizes, in bytes and in files; again with room",
        "disks",
        on_disks,
    ),
    Row(
        "No wrong answer from a server in trouble, every failure of a known kind, recovery without a new client",
        "Triton killed, restarted with other files, stopped, slow, out of queue; connections closed, cut, garbled, "
        "silent, bits flipped under TLS; answers tampered with; gRPC and HTTP, blocking and asyncio",
        "faults",
        faulty,
    ),
    Row(
        "Nothing fails and nothing grows under load and version switches",
        "clients in two processes (`MALLOC_ARENA_MAX=1`), switches every few seconds, each answer checked",
        "soak",
        lambda f: (
            f"{f['seconds'] / 60:.0f} minutes, {f['calls']:,} calls, {sum(f['switches'].values())} switches: "
            f"{f['calls'] - f['right']} failed or wrong, {len(f['left_behind'])} things left behind; server "
            f"{slope(f, 'server')}, clients {slope(f, 'client 0')} and {slope(f, 'client 1')}"
        ),
    ),
    Row(
        "Of two exporters on one repository, one waits or is refused",
        "`merge`, `promote`, `rollback`, `prune` started in pairs on a repository that is served",
        "concurrent_exporters",
        lambda f: (
            f"{f['pairs']} pairs: {f['done']} done, {f['told to wait']} refused, "
            f"{f.get('refused for another reason', 0)} with nothing to do; the repository whole after each"
        ),
    ),
    Row(
        "Listeners are on loopback",
        "all sockets of a server and a page; each tried from the machine's other addresses",
        "exposure",
        lambda f: (
            f"{f['listeners']['on loopback']} listeners of {f['listeners']['processes']} processes, all on loopback; "
            f"{f['listeners']['other addresses tried']} other ways in closed"
        ),
    ),
    Row(
        "Model control is for those who may write the repository",
        "all that it can be asked, without a key and with wrong ones, on both protocols; odd spellings of its paths",
        "exposure",
        lambda f: (
            f"{f['model control']['refused']} of {f['model control']['asked']} refused, none of "
            f"{f['model control']['spellings']} spellings let in"
        ),
    ),
    Row(
        "The demo page is for this machine's browser",
        "other sites' requests, other names for the address, uploads too large, damaged requests",
        "exposure",
        lambda f: (
            f"{f['page']['refused']} of {f['page']['strangers']} foreign requests and "
            f"{f['page']['uploads refused']} of {f['page']['uploads']} uploads refused, "
            f"{f['page']['damaged requests']:,} damaged requests survived"
        ),
    ),
    Row(
        "No secrets in what is printed",
        "key, token and passwords looked for in outputs and errors, with Triton's log shown",
        "exposure",
        lambda f: f"0 in {f['secrets']['outputs read']} outputs of {f['secrets']['characters']:,} characters",
    ),
    Row(
        "A server runs no file of the folder that it is started in",
        "namesakes of all modules of the standard library and of what Triton's Python imports, in the working folder "
        "and on PYTHONPATH",
        "surroundings",
        lambda f: f"{f['working folder']['run']} of {f['working folder']['modules']} were run",
    ),
    Row(
        "This machine is reached without a proxy",
        "all variables name a proxy that refuses everything; serve, promote and classify, gRPC and HTTP",
        "surroundings",
        lambda f: f"{f['proxies']['commands']} commands, {f['proxies']['requests to the proxy']} requests to the proxy",
    ),
    Row(
        "What clipweld did not write, it does not delete",
        "files and versions put into a repository and its store by hand, then every command that changes them",
        "surroundings",
        lambda f: f"{f['foreign']['placed']} files, {f['foreign']['commands']} commands, none gone or altered",
    ),
    Row(
        "A process that the kernel kills is replaced",
        "kill -9 of the process of a version that is served, until it answers again",
        "surroundings",
        lambda f: f"{f['killed']['kills']} kills, each answered again within {f['killed']['longest_s']:.1f} s",
    ),
    Row(
        "A program ends when it wants to, with calls half-way",
        "answers held by names, threads and loops; errors, sys.exit; gRPC and HTTP",
        "surroundings",
        lambda f: f"{f['endings']['programs']} programs of {f['endings']['kinds']} kinds, all ended as they meant to",
    ),
    Row(
        "A classifier works on in a forked child, and in its parent",
        "made and used, then two children by fork that ask at once, and the parent again; gRPC and HTTP",
        "surroundings",
        lambda f: f"{f['forks']['children']} children, all answered as their parents",
    ),
    Row(
        "Dependencies are pinned, listed, audited",
        "each installed package against `requirements/dev.txt`; CycloneDX list; pip-audit",
        "dependencies",
        lambda f: (
            f"{f['installed']} installed, all pinned and listed; "
            + (
                f"{f['audited']} audited, {f['vulnerabilities']} vulnerable"
                if f["audited"]
                else "no data on vulnerabilities could be reached from there"
            )
        ),
    ),
    Row(
        "NaN and infinity are found where they arise",
        "planted in checkpoints, adapters, training, merges, casts, towers and answers",
        "numbers",
        lambda f: f"{f['found and named']} of {f['planted']} found, the place named",
    ),
)


def main(arguments: Sequence[str]) -> None:
    """Print the table in Markdown for a folder of records."""
    records = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(arguments[0]).glob("*.json"))
    }
    headings = ("promise", "how it is tested", "command", "found")
    print(*table(headings, (_cells(row, records.get(row.record)) for row in ROWS), text=4), sep="\n")


def _cells(row: Row, record: dict | None) -> tuple[str, ...]:
    if record is None:
        return row.promise, row.test, f"`python -m evidence.trust.{row.record}`", "no run on record yet"
    held = "" if not record["broken"] else f" **BROKEN {len(record['broken'])} times**"
    command = record["command"].partition(" --out")[0]
    return row.promise, row.test, f"`{command}`", f"{row.found(record['figures'])}{held}"


if __name__ == "__main__":
    main(sys.argv[1:])
