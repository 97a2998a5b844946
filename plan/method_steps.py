"""The steps and alternatives of a recipe: methods by name, each with its validated settings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..compress.base import DENSE, Method, Settings, get_method, methods
from ..compress.chain import combine, require_fit
from ..errors import did_you_mean
from .recipe_errors import problems_of

READS_NO_TEXT = "reads no text"  # metadata of a recipe key that by itself needs no calibration text


class MethodStep(BaseModel):
    """One step of a recipe: a method and its settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        return _known_method(name)

    @field_validator("settings")
    @classmethod
    def _settings_fit(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _fitting_settings(settings, info.data.get("method"))

    @property
    def parsed(self) -> tuple[Method, Settings]:
        """The method, and its settings as an instance of its settings class, with all defaults."""
        method = get_method(self.method)
        return method, method.settings(**self.settings)


class Steps(BaseModel):
    """The keys that a recipe shares with its alternatives: one method with its settings, or two methods as steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Annotated[str | None, READS_NO_TEXT] = None
    settings: Annotated[dict[str, Any], READS_NO_TEXT] = Field(default_factory=dict)
    steps: Annotated[tuple[MethodStep, ...], READS_NO_TEXT] = ()

    @field_validator("method")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return None if name is None else _known_method(name)

    @field_validator("settings")
    @classmethod
    def _settings_fit(cls, settings: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return _fitting_settings(settings, info.data.get("method"))

    @model_validator(mode="after")
    def _steps_fit_each_other(self) -> Steps:
        if len(self.steps) > 2:
            raise ValueError(
                f"'steps' has {len(self.steps)} methods; at most two fit: the second compresses the first one's factors"
            )
        if len(self.steps) == 2 and self.method is None:
            require_fit(*self.parsed)
        return self

    @property
    def parsed(self) -> tuple[Method, Settings]:
        """The method (both steps combined into one) and its settings with all defaults; the dense method if none is given."""
        if self.method is not None:
            return MethodStep(method=self.method, settings=self.settings).parsed
        return combine([step.parsed for step in self.steps]) if self.steps else (DENSE, Settings())

    def spelled_out(self) -> dict[str, Any]:
        """The key `method` or `steps` as plain data with every default; empty if neither is given."""
        if self.method is not None:
            return {"method": self.method, "settings": self.parsed[1].model_dump(mode="json")}
        parts = [step.parsed for step in self.steps]
        return {"steps": [{"method": m.name, "settings": s.model_dump(mode="json")} for m, s in parts]} if parts else {}


class Alternative(Steps):
    """One of several methods of a recipe; the allocation chooses one of them for each target."""

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Alternative:
        if (self.method is None) == (not self.steps):
            raise ValueError("give either 'method' or 'steps'")
        return self


def _known_method(name: str) -> str:
    if name not in methods():
        raise ValueError(f"there is no method '{name}'. {did_you_mean(name, methods())}")
    return name


def _fitting_settings(settings: dict[str, Any], name: str | None) -> dict[str, Any]:
    if name is not None:  # absent if the method itself is unknown
        fitting(settings, get_method(name).settings, "settings.")
    return settings


def fitting(settings: dict[str, Any], known: type[Settings], prefix: str) -> None:
    """Refuse settings that do not fit a settings class; the message names the keys as the recipe writes them.

    Args:
        settings: settings as the recipe gives them.
        known: the settings class of the method or the rule.
        prefix: prefix of the keys in the message, such as 'settings.'.

    Raises:
        PydanticCustomError: of type 'settings', with every problem.
    """
    try:
        known(**settings)
    except ValidationError as error:
        problems = problems_of(error, known, prefix)
        raise PydanticCustomError("settings", "{problems}", {"problems": problems}) from None
