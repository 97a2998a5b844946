"""The recipe: what the user asks for, validated as a whole.

A recipe names a method and its settings, the budget and how to share it out, and the calibration set. It refuses unknown
keys. `plan/load_recipe.py` reads recipes from YAML and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..calibrate.data import CalibrationSpec
from ..calibrate.gradients import GradientSettings
from ..compress.base import BACKWARD_NEEDS, Method, Settings
from ..compress.mixture import MixtureSettings, mixture
from ..depth.spec import DepthSpec
from ..errors import BudgetError, did_you_mean
from ..refine.objectives import BlockSettings, EndToEndSettings
from . import budget
from .limits import Limit
from .method_steps import READS_NO_TEXT, Alternative, Steps, fitting
from .rules.base import Rule, rules

_HELD_OUT = 4  # default number of held-out windows by which a search measures perplexity
LATER_KEY = "later key"
SOLVED = ("uniform", "spectrum", "kl", "fisher", "own")  # rules of plan/allocation.py; plan/rules/ holds the others


class RefineSpec(BaseModel):
    """Training of the stored tensors towards the original model; it does not change their size.

    Args:
        block: trains each layer as soon as it is compressed, towards the output of the original layer.
        end_to_end: trains the whole compressed model at the end, towards the predictions of the original model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    block: BlockSettings | None = None
    end_to_end: EndToEndSettings | None = Field(None, alias="end-to-end")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        names = [given] if isinstance(given, str) else given
        return {name: {} for name in names} if isinstance(names, list) else given

    @model_validator(mode="after")
    def _something(self) -> RefineSpec:
        if self.block is None and self.end_to_end is None:
            raise ValueError("name 'block', 'end-to-end' or both; leave the key out for none")
        return self


class Recipe(Steps):
    """One compression as the user asks for it.

    Args:
        method: name of a method (`lrc recipe methods`); short for one step.
        settings: settings of `method`.
        steps: instead of `method`: two methods; the second compresses the factors that the first one finds.
        alternatives: instead of `method`: several methods; the allocation chooses the best one for each target.
        depth: how to drop layers or sub-layers; alone, or before `method` or `steps` compress the remaining targets.
        ratio: fraction of the targets' bytes to remove, at least 0 and below 1; the command line may give it. It may be absent
            if the method's settings fix every size. With `depth` alone, and no number of layers there, it is the fraction of
            layers to drop.
        bits: instead of `ratio`: mean bits per weight of the targets; scales, masks and indices count too, except where it
            names the codes of a method that only rounds (see `bits_of_codes`).
        size: instead of `ratio`: size of the weight files on disk ('300MB').
        max_ppl_increase: instead of `ratio`: allowed rise of perplexity on held-out calibration tokens ('5%'); a search finds
            the size (run/search.py).
        allocation: rule that shares the budget out; `uniform` removes the same fraction of every target, most others weigh the
            loss of each target (docs/allocation.md).
        allocation_settings: settings of the allocation rule (`lrc recipe rules`).
        rank_multiple: all ranks are multiples of this number; a budget rounds a rank down, `own` rounds the method's rank up.
        propagate: 'original' takes statistics from the original model (one-shot); 'compressed' takes them from the part that
            is already compressed (sequential).
        refine: training of the stored tensors, measured on held-out windows (`calibration.held_out`).
        keep: patterns (`*self_attn.k_proj`, `model.layers.0.*`) of targets that stay dense.
        limits: pattern -> bounds on the bytes of the targets, or their rank (plan/limits.py).
        calibration: the calibration set.
        gradients: settings of the backward pass, for methods and rules that need one.
    """

    # key of an earlier version -> the advice in the error for a recipe that still has it
    gone: ClassVar[Mapping[str, str]] = {
        "droppable": "Dropping sub-layers beside low rank never paid: leave it out (docs/allocation.md).",
        "correction": "No gain was measured: leave it out, or use refine: block (docs/refinement.md).",
        "uniform_within": "No recipe used it: leave it out. allocation: uniform treats all layers alike.",
    }

    # READS_NO_TEXT: the key by itself needs no calibration text; LATER_KEY: `resolved` omits the key if it is empty
    alternatives: Annotated[tuple[Alternative, ...], READS_NO_TEXT] = ()
    depth: Annotated[DepthSpec | None, LATER_KEY] = None
    ratio: Annotated[float | None, READS_NO_TEXT] = None
    bits: Annotated[float | None, READS_NO_TEXT, LATER_KEY] = None
    size: Annotated[str | None, READS_NO_TEXT, LATER_KEY] = None
    max_ppl_increase: Annotated[float | None, LATER_KEY] = None
    allocation: Annotated[str, READS_NO_TEXT] = "uniform"
    allocation_settings: Annotated[dict[str, Any], READS_NO_TEXT, LATER_KEY] = Field(default_factory=dict)
    rank_multiple: Annotated[int, READS_NO_TEXT] = Field(1, ge=1, le=1024)
    propagate: Annotated[Literal["original", "compressed"], READS_NO_TEXT] = "original"
    refine: Annotated[RefineSpec | None, LATER_KEY] = None
    keep: Annotated[tuple[str, ...], READS_NO_TEXT] = ()
    limits: Annotated[dict[str, Limit], READS_NO_TEXT, LATER_KEY] = Field(default_factory=dict)
    calibration: Annotated[CalibrationSpec, READS_NO_TEXT] = CalibrationSpec(source="wikitext2")
    gradients: Annotated[GradientSettings, READS_NO_TEXT] = GradientSettings()

    @field_validator("ratio")
    @classmethod
    def _a_fraction(cls, ratio: float | None) -> float | None:
        return None if ratio is None else budget.checked_ratio(ratio)

    @field_validator("allocation")
    @classmethod
    def _a_rule(cls, name: str) -> str:
        if name not in SOLVED and name not in rules():
            raise ValueError(f"there is no rule of that name. {did_you_mean(name, [*SOLVED, *rules()])}")
        return name

    @field_validator("allocation_settings")
    @classmethod
    def _rule_settings_fit(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if (name := info.data.get("allocation")) is not None:  # absent if the rule itself is unknown
            fitting(settings, rules()[name].settings if name in rules() else Settings, "allocation_settings.")
        return settings

    @field_validator("bits")
    @classmethod
    def _bits_of_a_weight(cls, bits: float | None) -> float | None:
        return None if bits is None else budget.checked_bits(bits)

    @field_validator("size", mode="before")
    @classmethod
    def _a_size(cls, size: Any) -> str | None:
        return None if size is None else f"{budget.bytes_of(str(size))}B"

    @field_validator("max_ppl_increase", mode="before")
    @classmethod
    def _a_rise(cls, rise: Any) -> float | None:
        return None if rise is None else budget.rise_of(rise)

    @field_validator("keep", mode="before")
    @classmethod
    def _a_list(cls, keep: Any) -> Any:
        if isinstance(keep, str):
            raise ValueError(f"write a list of patterns: ['{keep}']")
        return keep

    @model_validator(mode="before")
    @classmethod
    def _windows_to_search_by(cls, data: Any) -> Any:
        """Set the default number of held-out windows for a search, if the recipe gives no number."""
        if isinstance(data, dict) and data.get("max_ppl_increase") is not None:
            calibration = data.get("calibration", {"source": "wikitext2"})
            if isinstance(calibration, dict) and "held_out" not in calibration:
                return data | {"calibration": calibration | {"held_out": _HELD_OUT}}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for clash in CLASHES:
            if clash.when(self):
                raise ValueError(clash.why(self))
        return self

    @property
    def rule(self) -> Rule | None:
        """The rule of `plan/rules/` that shares the budget out; None if the solver or the method does it."""
        return rules().get(self.allocation)

    @property
    def rule_settings(self) -> Settings:
        """The rule's settings as an instance of its settings class, with all defaults."""
        return (self.rule.settings if self.rule else Settings)(**self.allocation_settings)

    @property
    def amounts(self) -> dict[str, Any]:
        """The budget in the form that plan/budget.py reads; `size` in bytes."""
        return {"ratio": self.ratio, "bits": self.bits, "size": None if self.size is None else int(self.size[:-1])}

    @property
    def compresses_nothing(self) -> bool:
        """Whether the recipe only drops layers or sub-layers."""
        return not _methods(self)

    @property
    def asks_for_less(self) -> bool:
        """Whether the recipe gives a budget that is smaller than the model."""
        return bool(self.ratio) or any(each is not None for each in (self.bits, self.size, self.max_ppl_increase))

    @property
    def bits_of_codes(self) -> bool:
        """Whether `bits` says the bits of the codes of a method that only rounds; its scales and zero points come on top.

        So it is where the settings fix the same number, and nothing else in the recipe decides a size. It follows the usage of
        the field: 4-bit GPTQ has codes of 4 bits.
        """
        method, settings = self.parsed
        bits = getattr(settings, "bits", None) if settings.sized_by == "bits" else None
        alone = self.method is not None and self.depth is None and not (self.keep or self.limits)
        return method.joint is None and alone and self.allocation == "uniform" and self.bits is not None and self.bits == bits

    @property
    def reads_text(self) -> bool:
        """Whether the recipe needs calibration text; if not, the run fetches none."""
        asks = any(
            getattr(self, key) != field.default
            for key, field in type(self).model_fields.items()
            if READS_NO_TEXT not in field.metadata
        )
        return asks or self.allocation not in ("uniform", "own") or bool(self.compression[0].needs)

    @property
    def dropping(self) -> DepthSpec | None:
        """The key `depth`, with the recipe's ratio if `depth` itself gives no number of layers to drop."""
        if self.depth is None or self.depth.drop is not None or self.depth.ratio is not None:
            return self.depth
        if not self.ratio:
            what = "How many layers should go?" if self.ratio is None else "ratio 0 drops no layer."
            raise BudgetError(what, "Add --ratio 0.2, or --set depth.drop=6.")
        return self.depth.model_copy(update={"ratio": self.ratio})

    @property
    def compression(self) -> tuple[Method, Settings]:
        """The method of all steps together, and its settings with all defaults.

        The needs of this method include the statistics that the allocation rule reads.
        """
        method, settings = self._compression
        more = self.rule.needs if self.rule else frozenset[str]()
        return (method if more <= method.needs else replace(method, needs=method.needs | more)), settings

    @property
    def _compression(self) -> tuple[Method, Settings]:
        if self.alternatives:
            methods_, settings = zip(*(each.parsed for each in self.alternatives), strict=True)
            return mixture(methods_), MixtureSettings(alternatives=settings)
        return self.parsed

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain data with every default: the plan hashes it and `lrc.json` records it."""
        whole = self.model_dump(mode="json", by_alias=True, exclude={"method", "settings", "steps", "alternatives"})
        for key, field in type(self).model_fields.items():  # so that runs started before these keys existed can resume
            if LATER_KEY in field.metadata and not whole[key]:
                del whole[key]
        if self.rule is not None and self.rule.settings.model_fields:
            whole["allocation_settings"] = self.rule_settings.model_dump(mode="json")
        if self.alternatives:
            return {"alternatives": [each.spelled_out() for each in self.alternatives]} | whole
        return self.spelled_out() | whole


@dataclass(frozen=True)
class Clash:
    """A combination of keys that a recipe must not have; the error shows only the first clash in the order of `CLASHES`.

    Args:
        when: tells whether a recipe has this clash.
        why: gives the error message: the reason and the remedy.
    """

    when: Callable[[Recipe], bool]
    why: Callable[[Recipe], str]


def _methods(recipe: Recipe) -> list[str]:
    return [key for key in ("method", "steps", "alternatives") if getattr(recipe, key)]


def _budgets(recipe: Recipe) -> list[str]:
    return [key for key in budget.KEYS if getattr(recipe, key) is not None]


def _unjudged(recipe: Recipe) -> list[str]:
    judged = ("refine", "max_ppl_increase")
    return [] if recipe.calibration.held_out else [key for key in judged if getattr(recipe, key) is not None]


def _counts_layers(recipe: Recipe) -> bool:
    return recipe.depth is not None and (recipe.depth.drop is not None or recipe.depth.ratio is not None)


def _rule_refuses(recipe: Recipe) -> str:
    return "" if recipe.rule is None else recipe.rule.why_not(recipe.compression[0])


CLASHES = (
    # methods
    Clash(lambda r: len(_methods(r)) > 1, lambda r: f"give either {' or '.join(map(repr, _methods(r)))}, not both"),
    Clash(lambda r: not _methods(r) and r.depth is None, lambda r: "'method' is missing"),
    Clash(
        lambda r: bool(r.settings) and r.method is None,
        lambda r: (
            "settings are those of one method, and there is none here; write "
            + (f"{_methods(r)[0]}.0.settings" if _methods(r) else "depth")
        ),
    ),
    Clash(
        lambda r: bool(r.alternatives) and r.allocation in ("uniform", "own"),
        lambda r: f"allocation: {r.allocation} cannot choose between alternatives; use kl or spectrum",
    ),
    # depth
    Clash(
        lambda r: r.depth is not None and bool(_methods(r)) and not _counts_layers(r),
        lambda r: "depth: say how many layers to drop (drop or ratio); the recipe's ratio is that of all steps",
    ),
    Clash(
        lambda r: _counts_layers(r) and bool(r.ratio) and r.method is None and not r.steps,
        lambda r: "depth gives the amount to drop; leave out either that (depth.drop, depth.ratio) or the recipe's ratio",
    ),
    Clash(
        lambda r: r.depth is not None and (r.allocation != "uniform" or bool(r.compression[0].needs & BACKWARD_NEEDS)),
        lambda r: "depth works only with allocation: uniform and with methods that need no backward pass",
    ),
    # held-out text
    Clash(
        lambda r: bool(_unjudged(r)),
        lambda r: f"{_unjudged(r)[0]} is measured on held-out windows: give their number (calibration.held_out: 4)",
    ),
    # size of the budget
    Clash(
        lambda r: len(_budgets(r)) > 1,
        lambda r: f"{' and '.join(_budgets(r))} say the budget {len(_budgets(r))} times; give one of them",
    ),
    Clash(
        lambda r: r.allocation == "own" and bool(_budgets(r)),
        lambda r: (
            "allocation: own lets the method's settings decide every size; "
            f"leave out {_budgets(r)[0]}, or take allocation: uniform"
        ),
    ),
    Clash(
        lambda r: r.allocation == "own" and bool(r.limits),
        lambda r: "allocation: own lets the method's settings decide every size; leave out limits",
    ),
    Clash(
        lambda r: r.max_ppl_increase is not None and not _methods(r),
        lambda r: (
            "max_ppl_increase: the search varies the ratio of a method, and this recipe has no method; give depth.drop or ratio"
        ),
    ),
    # allocation of the budget
    Clash(
        lambda r: r.allocation == "fisher" and "grad_gram" not in r.compression[0].needs,
        lambda r: f"allocation: fisher needs losses in nats, and {r.compression[0].name} gives others; use kl or kfac",
    ),
    Clash(lambda r: bool(_rule_refuses(r)), _rule_refuses),
    Clash(
        lambda r: r.rule is not None and bool(r.limits) and not r.rule.limits,
        lambda r: f"allocation: {r.allocation} cannot satisfy limits; leave them out (keep makes targets stay dense)",
    ),
    Clash(
        lambda r: r.rule is not None and "weight_grad" in r.rule.needs and r.gradients.labels != "data",
        lambda r: (
            f"allocation: {r.allocation} reads the mean gradient, which is zero for labels drawn from the model; "
            "set gradients.labels to data"
        ),
    ),
    # methods that solve targets of several layers at once
    Clash(
        lambda r: r.compression[0].across_layers and r.propagate == "compressed",
        lambda r: f"{r.method} solves targets of several layers at once and needs 'propagate: original'",
    ),
    Clash(
        lambda r: r.compression[0].across_layers and r.refine is not None and r.refine.block is not None,
        lambda r: f"{r.method} shares factors across layers, and refine: block trains single layers; use refine: end-to-end",
    ),
    Clash(
        lambda r: r.compression[0].across_layers and r.depth is not None,
        lambda r: f"{r.method} solves targets of several layers at once; drop layers in a run of its own first",
    ),
)
