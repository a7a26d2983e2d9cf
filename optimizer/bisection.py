"""The first pass that breaks a model's numbers, and the first of its sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import tvm

from optimizer import reference
from optimizer.certificate import certify
from optimizer.certification import fixed_shapes
from optimizer.compile import CompileOptions, import_with, runner_of
from optimizer.errors import CertificateError
from optimizer.frontend.model_file import ModelFile
from passes.base import Pass, PatternPass, Site
from passes.pipeline import run

Check = Callable[[tvm.IRModule], str | None]


@dataclass(frozen=True)
class Finding:
    """What a bisection found: `error` is None where the numbers are right with all passes.

    `guilty` is the first pass that breaks them, and `site` the first place where it does, if the pass says; without a
    guilty pass, the numbers are wrong before any pass has run.
    """

    error: str | None
    guilty: Pass | None = None
    site: Site | None = None


def bisect(source: ModelFile, options: CompileOptions, passes: Sequence[Pass]) -> Finding:
    """Compile `source` with fewer and fewer of the passes, and compare the numbers with a reference each time.

    The target has to be one that this machine executes. Raises CertificateError where no reference runs the model.
    """
    imported = import_with(options, source.model, source.directory)

    def check(module: tvm.IRModule) -> str | None:
        try:
            certify(
                source.model,
                runner_of(module, imported, options.target),
                path=source.path,
                shapes={**fixed_shapes(source.model, imported), **options.shapes},
                precision=options.operand_dtype,
                unoptimized=reference.lazily_unoptimized(imported),
            )
        except CertificateError as error:
            return str(error)
        return None

    modules = [imported.module]
    run(imported.module, passes, after=lambda record: modules.append(record.outcome.module))
    error = check(modules[-1])
    if error is None:
        return Finding(None)
    first, error = _first_wrong(modules, check, error)
    if first == 0:
        return Finding(error)
    guilty = passes[first - 1]
    return Finding(error, guilty, _first_wrong_site(guilty, modules[first - 1], check))


def _first_wrong(modules: Sequence[tvm.IRModule], check: Check, error: str) -> tuple[int, str]:
    """Return the position and the error of the first wrong module, the last being wrong and right ones preceding."""
    right, wrong = -1, len(modules) - 1
    while wrong - right > 1:
        middle = (right + wrong) // 2
        found = check(modules[middle])
        if found is None:
            right = middle
        else:
            wrong, error = middle, found
    return wrong, error


def _first_wrong_site(guilty: Pass, module: tvm.IRModule, check: Check) -> Site | None:
    """Return the first site whose rewriting makes the numbers wrong."""
    if not isinstance(guilty, PatternPass):
        return None
    rewritten = [site for site in guilty.run(module).sites if site.refusal is None]
    right, wrong = 0, len(rewritten)
    while wrong - right > 1:
        middle = (right + wrong) // 2
        if check(guilty.run_first(module, middle).module) is None:
            right = middle
        else:
            wrong = middle
    return rewritten[wrong - 1] if rewritten else None
