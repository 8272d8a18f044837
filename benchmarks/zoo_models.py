"""The models of the architecture sweep: every name in torchvision, one small member of each timm module.

Nothing here knows how they are pruned: the peer's script builds its models from the same lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 2
TORCHVISION_SETS = ("classification", "segmentation", "video", "quantization", "optical_flow", "detection")

# Input height and width where 64 is too small, or where the model is built for one size.
SIZES = {
    "alexnet": 80,
    "inception_v3": 96,
    "quantized_inception_v3": 96,
    "maxvit_t": 224,
    "raft_large": 128,
    "raft_small": 128,
    "s3d": 224,
    "mvit_v1_b": 224,
    "mvit_v2_s": 224,
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 128,
}
# Vision transformers take their image size when built: fewer tokens, the same layers.
IMAGE_SIZES = {"vit_b_16": 112, "vit_b_32": 128, "vit_l_16": 112, "vit_l_32": 128, "vit_h_14": 112}
DETECTOR_SIDE = 128
FRAMES = {"s3d": 16, "mvit_v1_b": 16, "mvit_v2_s": 16}

# timm module -> its smallest member (by parameters) that is not one of timm's own `test_` stand-ins.
TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "mobileone_s1",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "mnasnet_small",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "coatnet_nano_rw_224",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "mixer_s32_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p16_224",
}
# Families that share a module with another one above.
TIMM_MORE = (
    *("mobilenetv4_conv_small", "mobilenetv4_hybrid_medium", "efficientnet_lite0", "mixnet_s", "tinynet_e"),
    *("repvgg_a0", "gernet_s", "cspdarknet53", "cspresnet50", "cspresnext50", "res2net50_14w_8s"),
    *("nfnet_l0", "eca_botnext26ts_256", "lambda_resnet26t", "resnetv2_50d_gn", "densenetblur121d"),
    *("seresnext26t_32x4d", "skresnext50_32x4d", "legacy_senet154", "hgnet_tiny", "convnextv2_atto"),
    *("poolformer_s12", "convformer_s18", "caformer_s18", "gmlp_ti16_224", "resmlp_12_224"),
    *("maxvit_rmlp_pico_rw_256", "maxvit_tiny_rw_224", "ghostnetv2_100", "ghostnetv3_050", "edgenext_small"),
    *("levit_conv_128s", "mobilevitv2_050", "visformer_small", "vit_relpos_small_patch16_224"),
)

# Smallest square inputs tried, in this order, where a timm model does not fix its own.
TRIED_SIZES = (64, 96, 128, 160, 192, 224, 256, 320, 384)


@dataclass(frozen=True)
class Spec:
    """One model of the sweep. part: the submodule that is pruned, "" for the whole model."""

    group: str
    name: str
    family: str = ""
    part: str = ""

    @property
    def key(self) -> str:
        return f"{self.group}:{self.name}"


def specs(which: str = "all") -> list[Spec]:
    """The models of a set: torchvision, timm or all. Raises ValueError when the timm table has a gap."""
    found: list[Spec] = []
    if which in ("torchvision", "all"):
        found += _torchvision()
    if which in ("timm", "all"):
        check_complete()
        found += [Spec("timm", name, module) for module, name in TIMM.items()]
        found += [Spec("timm_more", name) for name in TIMM_MORE]
    return found


def find(key: str) -> Spec:
    """The spec with `key`, "group:name"."""
    which = "timm" if key.startswith("timm") else "torchvision"
    return next(spec for spec in specs(which) if spec.key == key)


def _torchvision() -> list[Spec]:
    import torchvision

    found = []
    for group in TORCHVISION_SETS:
        module = torchvision.models if group == "classification" else getattr(torchvision.models, group)
        part = "backbone" if group == "detection" else ""
        found += [Spec(group, name, part=part) for name in torchvision.models.list_models(module=module)]
    missing = set(torchvision.models.list_models()) - {spec.name for spec in found}
    if missing:
        raise ValueError(f"torchvision models in no set: {sorted(missing)}")
    return found


def check_complete() -> None:
    """Raise ValueError unless the table names every timm module, and of each a member."""
    import timm

    modules = set(timm.list_modules())
    wrong = modules ^ set(TIMM)
    wrong |= {name for module, name in TIMM.items() if name not in timm.list_models(module=module)}
    wrong |= {name for name in TIMM_MORE if not timm.is_model(name)}
    if wrong:
        raise ValueError(f"the timm table and timm {timm.__version__} differ in {sorted(wrong)}")


def build(spec: Spec) -> nn.Module:
    """The whole model, without pretrained weights, in eval mode."""
    import torchvision

    if spec.group.startswith("timm"):
        import timm

        model: nn.Module = timm.create_model(spec.name, pretrained=False)
    else:
        model = torchvision.models.get_model(spec.name, **_options(spec))
    return model.eval()


def _options(spec: Spec) -> dict[str, Any]:
    options: dict[str, Any] = {"weights": None}
    if spec.group in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if spec.group == "detection" and not spec.name.startswith("ssd"):  # those have a size of their own
        options |= {"min_size": DETECTOR_SIDE, "max_size": DETECTOR_SIDE}
    if spec.group == "quantization":
        options["quantize"] = False
    if "googlenet" in spec.name or "inception_v3" in spec.name:
        options["init_weights"] = False
    if spec.name in IMAGE_SIZES:
        options["image_size"] = IMAGE_SIZES[spec.name]
    return options


def part(spec: Spec, model: nn.Module) -> nn.Module:
    """What of the model is traced and pruned."""
    return model.get_submodule(spec.part) if spec.part else model


def inputs(spec: Spec, model: nn.Module, batch: int = BATCH, seed: int = 0) -> tuple[Tensor, ...]:
    """Standard normal inputs of `part(spec, model)`, as small as it takes them."""
    if spec.group.startswith("timm"):
        return _timm_inputs(model, batch, seed)
    side = IMAGE_SIZES.get(spec.name, SIZES.get(spec.name, 64))
    if spec.group == "video":
        return (_normal((batch, 3, FRAMES.get(spec.name, 8), side, side), seed),)
    shape = (batch, 3, side, side)
    if spec.group == "optical_flow":
        return _normal(shape, seed), _normal(shape, seed + 1)
    return (_normal(shape, seed),)


def whole_inputs(spec: Spec, seed: int = 0) -> tuple[list[Tensor]]:
    """What a detector takes: a list of images in [0, 1]."""
    side = SIZES.get(spec.name, DETECTOR_SIDE)
    return (list(_normal((BATCH, 3, side, side), seed).sigmoid()),)


def _timm_inputs(model: Any, batch: int, seed: int) -> tuple[Tensor, ...]:
    import torch

    config = model.default_cfg
    side = config["input_size"][-1]
    if config.get("fixed_input_size"):
        return (_normal((batch, 3, side, side), seed),)
    least = (config.get("min_input_size") or (3, 0, 0))[-1]
    for tried in (t for t in (*TRIED_SIZES, side) if least <= t <= side):
        x = _normal((batch, 3, tried, tried), seed)
        try:
            with torch.no_grad():
                model(x)
        except (RuntimeError, AssertionError, ValueError, IndexError):
            continue
        return (x,)
    raise ValueError(f"no input size up to {side} works")


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every small or constant parameter and every batch-norm statistic a size that matters.

    Zero-initialised heads, layer scales of 1e-6 and fresh statistics would make the checks vacuous.
    """
    import torch

    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() <= 1:
                bias = name.endswith(("bias", "beta"))
                shift, scale = torch.randn(p.shape, generator=g), torch.rand(p.shape, generator=g)
                p.copy_(0.2 * shift if bias else scale + 0.5)
            elif float(p.abs().mean()) < 1e-3:
                p.copy_(torch.randn(p.shape, generator=g) * 0.1)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.2)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=g) + 0.5)


def calibrate(model: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Batch-norm statistics of the inputs `given`, as training would leave them.

    Without it a deep network of random weights answers nearly the same to every input, or overflows.
    """
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:  # they alone: no dropout, no branch for training
            norm.train()
            norm.momentum = 1.0
        with torch.no_grad():
            model(*given)
            for norm in norms:
                if norm.running_var is not None:  # a channel that is always 0 must not divide by 0
                    norm.running_var.clamp_(min=0.01 * float(norm.running_var.median()) + 1e-6)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
