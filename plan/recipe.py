"""What the user wants: a recipe, checked as a whole.

A recipe names a method, its settings, where the budget goes and what to calibrate on. Unknown keys are refused. `reading.py`
reads recipes from YAML and the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..calibrate.data import CalibrationSpec
from ..calibrate.gradients import GradientSettings
from ..compress.base import BACKWARD_NEEDS, Method, Settings
from ..compress.mixture import MixtureSettings, mixture
from ..depth.spec import DepthSpec
from ..errors import BudgetError, did_you_mean
from ..refine.correction import CorrectionSpec
from ..refine.objectives import BlockSettings, EndToEndSettings
from . import budget as amount
from .limits import Limit
from .method_steps import Alternative, Steps, fitting
from .rules.base import Rule, rules

_HELD_OUT = 4  # windows that judge a searched size
# keys that ask for no text by themselves; a key that is not named here counts as one that does
_BLIND = {"method", "settings", "steps", "alternatives", "ratio", "allocation", "rank_multiple", "propagate", "keep",
          "calibration", "gradients", "bits", "size", "allocation_settings", "limits"}  # fmt: skip

SOLVED = ("uniform", "spectrum", "kl", "fisher", "own")  # shared out by allocation.py itself; the others are in rules/


class RefineSpec(BaseModel):
    """Training of what is stored, against the original; costs no byte.

    Args:
        block: layer after layer, as each is compressed, towards the original layer's output.
        end_to_end: the whole at the end, towards the original's predictions.
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
    """One compression, as wanted.

    Args:
        method: a name from `lrc recipe methods`; short for one step.
        settings: the method's own settings.
        steps: in the place of `method`: two methods, of which the second compresses the factors that the first one finds.
        alternatives: in the place of `method`: several, of which the budget takes for each target the one that pays there.
        depth: layers to drop first; alone, or before `method` or `steps` compress what stays.
        ratio: fraction of the targets' bytes to remove, 0 to below 1; may come from the command line. Not needed where the
            settings fix every size. With `depth` alone and no count of layers there, the fraction of layers.
        bits: in the place of `ratio`: mean bits per weight of the targets, everything that their forms hold counted.
        size: in the place of `ratio`: of the files with the model's weights ('300MB').
        max_ppl_increase: in the place of `ratio`: how far perplexity on held-out calibration tokens may rise ('5%'); the size
            is searched (search.py).
        allocation: how the budget is shared out; `uniform` takes the same fraction of every target, the others look at what
            each target would lose (docs/allocation.md).
        allocation_settings: of a rule that has some (`lrc recipe rules`).
        rank_multiple: ranks are multiples of this; a budget rounds them down, `own` rounds up what the method asks for.
        propagate: 'original': statistics come from the original model (one-shot); 'compressed': from the part already
            compressed (sequential).
        correction: of the matrices for the inputs that they will see; with `propagate: compressed`.
        refine: training of what is stored, by windows that no statistic saw (`calibration.held_out`).
        keep: patterns (`*self_attn.k_proj`, `model.layers.0.*`) of targets that stay dense.
        limits: pattern -> floors and caps of the bytes that targets keep, or their ranks (limits.py).
        calibration: what statistics are taken on.
        gradients: how the backward pass is made, for methods that need one.
    """

    # keys of earlier versions -> what a recipe that still has one is told
    gone: ClassVar[Mapping[str, str]] = {
        "droppable": "Dropping sub-layers beside low rank never paid: leave it out (docs/allocation.md).",
        "uniform_within": "No recipe used it: leave it out. allocation: uniform treats all layers alike.",
    }

    alternatives: tuple[Alternative, ...] = ()
    depth: DepthSpec | None = None
    ratio: float | None = None
    bits: float | None = None
    size: str | None = None
    max_ppl_increase: float | None = None
    allocation: str = "uniform"
    allocation_settings: dict[str, Any] = Field(default_factory=dict)
    rank_multiple: int = Field(1, ge=1, le=1024)
    propagate: Literal["original", "compressed"] = "original"
    correction: CorrectionSpec | None = None
    refine: RefineSpec | None = None
    keep: tuple[str, ...] = ()
    limits: dict[str, Limit] = Field(default_factory=dict)
    calibration: CalibrationSpec = CalibrationSpec(source="wikitext2")
    gradients: GradientSettings = GradientSettings()

    @field_validator("ratio")
    @classmethod
    def _a_fraction(cls, ratio: float | None) -> float | None:
        return None if ratio is None else amount.checked_ratio(ratio)

    @field_validator("allocation")
    @classmethod
    def _a_rule(cls, name: str) -> str:
        if name not in SOLVED and name not in rules():
            raise ValueError(f"there is no rule of that name. {did_you_mean(name, [*SOLVED, *rules()])}")
        return name

    @field_validator("allocation_settings")
    @classmethod
    def _rule_settings_fit(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if (name := info.data.get("allocation")) is not None:  # absent where it is wrong itself
            fitting(settings, rules()[name].settings if name in rules() else Settings, "allocation_settings.")
        return settings

    @field_validator("bits")
    @classmethod
    def _bits_of_a_weight(cls, bits: float | None) -> float | None:
        return None if bits is None else amount.checked_bits(bits)

    @field_validator("size", mode="before")
    @classmethod
    def _a_size(cls, size: Any) -> str | None:
        return None if size is None else f"{amount.bytes_of(str(size))}B"

    @field_validator("max_ppl_increase", mode="before")
    @classmethod
    def _a_rise(cls, rise: Any) -> float | None:
        return None if rise is None else amount.rise_of(rise)

    @field_validator("keep", mode="before")
    @classmethod
    def _a_list(cls, keep: Any) -> Any:
        if isinstance(keep, str):
            raise ValueError(f"write a list of patterns: ['{keep}']")
        return keep

    @model_validator(mode="before")
    @classmethod
    def _windows_to_search_by(cls, data: Any) -> Any:
        """A search needs held-out windows: as many as are usual here, where the recipe does not say."""
        if isinstance(data, dict) and data.get("max_ppl_increase") is not None:
            calibration = data.get("calibration", {"source": "wikitext2"})
            if isinstance(calibration, dict) and "held_out" not in calibration:
                return data | {"calibration": calibration | {"held_out": _HELD_OUT}}
        return data

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Recipe:
        given = [key for key in ("method", "steps", "alternatives") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"give either {' or '.join(repr(key) for key in given)}, not both")
        if not given and self.depth is None:
            raise ValueError("'method' is missing")
        if self.settings and self.method is None:
            where = f"{given[0]}.0.settings" if given else "depth"
            raise ValueError(f"settings are those of one method, and there is none here; write {where}")
        if self.alternatives and self.allocation in ("uniform", "own"):
            raise ValueError(f"allocation: {self.allocation} cannot choose between alternatives; take kl or spectrum")
        if self.depth is not None:
            self._fits_depth()
        for key in ("refine", "correction", "max_ppl_increase"):
            if getattr(self, key) is not None and not self.calibration.held_out:
                raise ValueError(f"{key} is judged by held-out windows: say how many (calibration.held_out: 4)")
        if self.correction is not None and self.propagate != "compressed":
            raise ValueError("correction follows the compressed model's inputs: it goes with propagate: compressed")
        self._one_budget()
        _ = self.compression
        self._fits_rule()
        self._fits_joint()
        return self

    def _one_budget(self) -> None:
        said = [way for way in amount.WAYS if getattr(self, way) is not None]
        if len(said) > 1:
            raise ValueError(f"{' and '.join(said)} say the budget {len(said)} times; give one of them")
        if self.allocation == "own" and said and said != ["ratio"]:
            raise ValueError(f"allocation: own lets the method's settings decide every size; leave out {said[0]}")
        if self.allocation == "own" and self.limits:
            raise ValueError("allocation: own lets the method's settings decide every size; leave out limits")
        if self.max_ppl_increase is not None and not (self.method or self.steps or self.alternatives):
            raise ValueError("max_ppl_increase: the search goes by ratios, and whole layers have none; say depth.drop or ratio")

    def _fits_rule(self) -> None:
        method, rule = self.compression[0], self.rule
        if self.allocation == "fisher" and "grad_gram" not in method.needs:
            raise ValueError(f"allocation: fisher takes losses that are in nats, and {method.name}'s are not; use kl or kfac")
        if rule is None:
            return
        if why := rule.why_not(method):
            raise ValueError(why)
        if self.limits and not rule.limits:
            raise ValueError(f"allocation: {rule.name} cannot be held to limits; keep: leaves targets dense")
        if "weight_grad" in rule.needs and self.gradients.labels != "data":
            raise ValueError(
                f"allocation: {rule.name} reads the mean gradient, which is zero for labels drawn from the model; "
                "set gradients.labels to data"
            )

    @property
    def rule(self) -> Rule | None:
        """The rule of `rules/` that shares the budget out; None where the solver or the method does."""
        return rules().get(self.allocation)

    @property
    def rule_settings(self) -> Settings:
        """The rule's settings as its own class, defaults filled in."""
        return (self.rule.settings if self.rule else Settings)(**self.allocation_settings)

    @property
    def amounts(self) -> dict[str, Any]:
        """How much may stay, as amount.py takes it."""
        return {"ratio": self.ratio, "bits": self.bits, "size": None if self.size is None else int(self.size[:-1])}

    def _fits_joint(self) -> None:
        joint, name = self.compression[0].joint, self.method
        if joint is None or not joint.across_layers:
            return
        if self.propagate == "compressed":
            raise ValueError(f"{name} solves targets of several layers at once and needs 'propagate: original'")
        if self.refine is not None and self.refine.block is not None:
            raise ValueError(f"{name} shares between layers, which refine: block would train apart; use refine: end-to-end")
        if self.depth is not None:
            raise ValueError(f"{name} solves targets of several layers at once; drop layers in a run of its own before")

    def _fits_depth(self) -> None:
        assert self.depth is not None
        if (self.method or self.steps or self.alternatives) and self.depth.drop is None and self.depth.ratio is None:
            raise ValueError("depth: say how many layers shall go (drop or ratio); the recipe's ratio is that of all steps")
        counted = self.depth.drop is not None or self.depth.ratio is not None
        if counted and self.ratio and self.method is None and not self.steps:
            raise ValueError("depth says how much goes; leave out either that (depth.drop, depth.ratio) or the recipe's ratio")
        if self.allocation != "uniform" or self.compression[0].needs & BACKWARD_NEEDS:
            raise ValueError("depth goes with allocation: uniform and methods without a backward pass")

    @property
    def reads_text(self) -> bool:
        """Whether anything in this recipe looks at calibration text; where nothing does, none is fetched."""
        other = any(getattr(self, key) != field.default for key, field in type(self).model_fields.items() if key not in _BLIND)
        return other or self.allocation not in ("uniform", "own") or bool(self.compression[0].needs)

    @property
    def dropping(self) -> DepthSpec | None:
        """What `depth` asks for, with the recipe's own ratio where that says how many layers go."""
        if self.depth is None or self.depth.drop is not None or self.depth.ratio is not None:
            return self.depth
        if not self.ratio:
            raise BudgetError("How many layers should go?", "Add --ratio 0.2, or --set depth.drop=6.")
        return self.depth.model_copy(update={"ratio": self.ratio})

    @property
    def compression(self) -> tuple[Method, Settings]:
        """The method of all steps together, and its settings with defaults filled in.

        What the rule of sharing out needs to know is among the needs of the method that is returned.
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
        """Everything spelled out, defaults included: what the plan hashes and `lrc.json` keeps."""
        whole = self.model_dump(mode="json", by_alias=True, exclude={"method", "settings", "steps", "alternatives"})
        for key in _ABSENT:  # not there at all where nothing is said: runs of before these keys go on
            if whole[key] is None or whole[key] == {}:
                del whole[key]
        if self.rule is not None and self.rule.settings.model_fields:
            whole["allocation_settings"] = self.rule_settings.model_dump(mode="json")
        if self.alternatives:
            return {"alternatives": [each.spelled_out() for each in self.alternatives]} | whole
        return self.spelled_out() | whole


_ABSENT = (
    "depth",
    "correction",
    "refine",
    "allocation_settings",
    "bits",
    "size",
    "max_ppl_increase",
    "limits",
)
