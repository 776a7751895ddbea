"""The configuration: one section per concern, one field per value, each with its range and a line on what it is.

How a configuration is put together from preset, file and command line is in settings.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(ValueError):
    """The configuration is wrong; the message names the key, its origin and what is wanted."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # Python counts True as 1; in a configuration `epochs: true` is a mistake
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("a boolean is no value for it")
        return value


class Run(Section):
    name: str = Field("run", pattern=r"^[\w.-]+$", description="name of the recipe; run folders begin with it")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, augmentation and masks")
    fused: bool = Field(False, description="fused kernels instead of plain PyTorch; changes speed only")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto = cuda if there is one")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 = autocast; weights stay fp32")
    threads: int = Field(0, ge=0, description="CPU threads; 0 = torch's choice")
    check_every: Count = Field(
        50, description="steps between two looks at the non-finite guard on a GPU (CPU: every step)"
    )


class Model(Section):
    """Every other key is an option of the model (sdpnet.create_model)."""

    model_config = ConfigDict(extra="allow")
    name: str = Field("sdpnet_digits", description="one of sdpnet.list_models()")


class Data(Section):
    source: Literal["digits", "folder"] = Field(
        "digits", description="digits = the set in the package; folder = path/{train,val}/<class>/*"
    )
    path: str | None = Field(None, description="folder: where train/ and val/ are; digits: another copy of the file")
    image_size: Count = Field(224, description="folder: side of the crop in pixels")
    crop_scale: tuple[Positive, Positive] = Field(
        (0.08, 1.0), description="folder: part of the image's area a training crop has"
    )
    threads: Count = Field(4, description="folder: decoding threads")
    batch_size: Count = Field(512, description="samples per step")
    micro_batch: int = Field(0, ge=0, description="samples per forward pass, the gradients add up; 0 = the whole batch")
    eval_batch: Count = Field(512, description="samples per forward pass of an evaluation")


class Augment(Section):
    shift: Fraction = Field(0.0, description="largest shift, fraction of the side")
    rotate: float = Field(0.0, ge=0.0, le=180.0, description="largest angle, degrees")
    scale: NonNegative = Field(0.0, description="sizes from 1/(1+scale) to 1+scale")
    shear: NonNegative = Field(0.0, description="largest shear")
    flip: bool = Field(False, description="mirror every other sample")


class Optim(Section):
    base_lr: Positive = Field(0.001, description="rate per 512 samples: lr = base_lr · batch_size / 512")
    lr: Positive | None = Field(None, description="the peak rate itself, instead of the rule")
    weight_decay: NonNegative = Field(0.05, description="not on biases, norms, embeddings, registers, layer-scales")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="of AdamW")
    eps: Positive = Field(1e-8, description="of AdamW")
    clip: NonNegative = Field(5.0, description="largest norm of the whole gradient; 0 = no clipping")


class Schedule(Section):
    epochs: Count = Field(100, description="passes over the training set")
    warmup_epochs: NonNegative = Field(5.0, description="of linear warm-up")
    cycle_epochs: Positive | None = Field(
        None, description="length of the first cosine cycle; null = until the end, no restart"
    )
    cycle_growth: float = Field(1.0, ge=1.0, description="each cycle is so many times as long as the one before")
    min_lr: NonNegative = Field(0.0, description="rate at the end of a cycle, as a fraction of the peak", le=1.0)


class Loss(Section):
    kind: Literal["ce", "bce"] = Field("ce", description="cross entropy, or a yes/no question per class")
    smoothing: Fraction = Field(0.1, description="label smoothing")
    class_reduction: Literal["sum", "mean"] = Field("sum", description="bce: sum or mean over the classes")


class Ema(Section):
    decay: Fraction = Field(0.999, description="of the averaged weights")
    report: bool = Field(False, description="the run's top-1 is that of the averaged weights (else of the live ones)")


class Checkpoint(Section):
    every_epochs: Count = Field(1, description="epochs between two checkpoints; the last epoch always has one")
    keep: Count = Field(2, description="newest checkpoints kept")


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    ema: Ema = Ema()
    checkpoint: Checkpoint = Checkpoint()


SECTIONS: dict[str, type[Section]] = {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]
