"""What the pass that quantizes weights needs to know before it runs: fitted codes, and which matrices get more bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optimizer.errors import OptionError
from optimizer.frontend.importer import ImportedModel
from optimizer.quantization.fitting import fitted
from optimizer.quantization.observation import ObservedModel
from optimizer.quantization.quality import NO_LIMIT, Gate, QualityReport, held_to
from optimizer.quantization.samples import OWN, Samples, given_samples, own_samples
from passes.base import Pass
from passes.quantization.fitted import FITTED_METHODS, Exceptions
from passes.quantize_weights import QuantizeWeights


@dataclass(frozen=True)
class Calibration:
    """Files of inputs or text, the folder of the tokenizer, and the most that rounding may change the outputs."""

    files: tuple[Path, ...] = ()
    folder: Path = Path()
    gate: Gate = NO_LIMIT

    @property
    def gated(self) -> bool:
        """Whether there is a limit."""
        return self.gate != NO_LIMIT


def prepared(
    items: Sequence[Pass], imported: ImportedModel, calibration: Calibration
) -> tuple[tuple[Pass, ...], QualityReport | None]:
    """Return the passes with what QuantizeWeights needs to know, and the quality of the weights if that has a limit.

    Without calibration files a language model is run on text that it makes up. Raises OptionError where limits or files
    are given and no weights are quantized, and for models that need files; QualityError where the limits do not hold.
    """
    place = next((place for place, item in enumerate(items) if isinstance(item, QuantizeWeights)), None)
    item = items[place] if place is not None else None
    if place is None or not isinstance(item, QuantizeWeights):
        if calibration.files or calibration.gated:
            raise OptionError("calibration and limits are for weights that the compiler rounds; give --weights int4")
        return tuple(items), None
    fits = item.method in FITTED_METHODS and item.fitted is None
    if not fits and not calibration.gated:
        return tuple(items), None
    model = ObservedModel(imported, items[:place])
    samples = _samples(model, calibration)
    fitting, judging = samples.divided() if calibration.gated else (samples, samples)
    report = None
    if fits:
        item = fitted(item, model, fitting)
    if calibration.gated:
        item, report = held_to(calibration.gate, item, model, judging)
        item = replace(item, quality=str(report))
    return (*items[:place], item, *items[place + 1 :]), report


def refitted(items: Sequence[Pass], imported: ImportedModel, calibration: Calibration) -> tuple[Pass, ...] | None:
    """Return the passes that made a package, with weights fitted again to what they were fitted to.

    None where that is files, and none are given. Raises OptionError for other files than those.
    """
    place = next(
        (n for n, item in enumerate(items) if isinstance(item, QuantizeWeights) and item.method in FITTED_METHODS), None
    )
    item = items[place] if place is not None else None
    if place is None or not isinstance(item, QuantizeWeights):
        return tuple(items)
    if not calibration.files and item.calibration != OWN:
        return None
    model = ObservedModel(imported, items[:place])
    samples = _samples(model, calibration)
    if samples.source != item.calibration:
        raise OptionError(f"the weights were fitted to {item.calibration}, not to {samples.source}; give the former")
    # Weights with a limit were fitted to a part of the samples, before some of them were raised, which digests name.
    fitting = samples.divided()[0] if item.quality else samples
    raised = {site.digest for site in model.sites}
    asked = Exceptions(tuple(rule for rule in item.precisions.rules if rule[0] not in raised))
    again = fitted(replace(item, exceptions=str(asked)), model, fitting)
    return (*items[:place], replace(again, exceptions=item.exceptions), *items[place + 1 :])


def _samples(model: ObservedModel, calibration: Calibration) -> Samples:
    if calibration.files:
        return given_samples(calibration.files, model.entry, calibration.folder)
    return own_samples(model.logits, model.entry)
