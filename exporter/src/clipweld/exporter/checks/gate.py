"""Limits that a merge must satisfy besides parity."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from clipweld.exporter.errors import GateClosed
from clipweld.exporter.results import Accuracy, Agreement


@dataclass(frozen=True)
class Gate:
    """How good a version must be to be written.

    Attributes:
        min_accuracy: percent that every task must reach; None for no limit.
        max_drop: percentage points that a task may lose against the served version; None for no limit.
        min_agreement: share of answers, 0 to 1, in which a version of lower precision must agree with float32.
        force: write the version anyway, and record its faults.
    """

    min_accuracy: float | None = None
    max_drop: float | None = None
    min_agreement: float = 0.99
    force: bool = False

    def check(
        self,
        accuracies: Sequence[Accuracy],
        earlier: Collection[str] = (),
        agreements: Sequence[Agreement] | None = None,
    ) -> list[str]:
        """Return the faults of a version: none, or those that ``force`` overrides.

        Args:
            earlier: tasks that need a ``before``: the served version has learned them, or is measured on them.
            agreements: of a version of lower precision.

        Raises:
            GateClosed: there are faults and they are not forced; carries the measurements.
        """
        faults = [fault for accuracy in accuracies for fault in self._faults(accuracy, earlier)]
        if agreements is not None:
            images = sum(agreement.images for agreement in agreements)
            share = sum(agreement.top1 * agreement.images for agreement in agreements) / max(1, images)
            if not share >= self.min_agreement:  # NaN fails, here and below
                wanted = f"{100 * self.min_agreement:g}% wanted"
                faults.append(f"its answers are those of float32 on {share:.1%} of {images} images ({wanted})")
        if faults and not self.force:
            raise GateClosed(
                f"refused, nothing was written: {'; '.join(faults)}. Learn the task again, allow more, or --force",
                accuracies,
                agreements or (),
            )
        return faults

    def _faults(self, accuracy: Accuracy, earlier: Collection[str]) -> list[str]:
        task, before, after = accuracy.task, accuracy.before, accuracy.after
        asked = self.min_accuracy is not None or (self.max_drop is not None and task in earlier)
        if after is None:
            return [f"{task} has not been measured: give its images with --validate"] if asked else []
        faults = []
        if self.min_accuracy is not None and not after >= self.min_accuracy:
            faults.append(f"{task} is at {after:.1f}% ({self.min_accuracy:g}% wanted)")
        if self.max_drop is not None and task in earlier:
            if before is None:
                faults.append(f"{task} has not been measured before: give its images with --validate")
            elif not round(before - after, 6) <= self.max_drop:
                faults.append(f"{task} falls by {before - after:.1f} points ({self.max_drop:g} allowed)")
        return faults
