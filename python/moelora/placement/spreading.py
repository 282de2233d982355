"""`place`: takes a model's experts apart, so that this rank keeps its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moelora import adapters, attach, standin, weights
from moelora.errors import MoeloraError
from moelora.experts import projections
from moelora.placement import gradients, saving
from moelora.placement.group import Group
from moelora.placement.owners import owners_of
from moelora.placement.ranks import Ranks
from moelora.reporting import Report
from torch_moelora.formats import PackedWeight, stack

ANCHOR = "moelora_anchor"


def place(
    model: nn.Module, owners: str | Sequence[int] = "spread", group: dist.ProcessGroup | None = None
) -> Report:
    """Keep on each rank the experts that it owns, and send tokens to where their experts are.

    Called on all ranks, after `enable` and before DDP, `fully_shard` and the optimizer, and before or after
    PEFT's adapters are added (then `enable` again, as ever). Every rank has the same model at that time; from
    then on it has its own experts' frozen weights, dense or packed, and its own experts' LoRA factors. What
    it frees cannot be had back. Everything else stays as it is, to be replicated or sharded by others.

    Every rank calls the same layers equally often, if need be without tokens. Ranks' losses are taken to be
    averaged, as DDP does it: a factor's gradient is the sum over all ranks' tokens divided by their number.

    Args:
        model: an enabled model.
        owners: "spread", "rank0", or the rank in `group` of each expert, the same for all layers.
        group: the ranks that share the experts, which see each other's tokens; None for all.
    Returns: the report, which tells what is here.
    Raises: MoeloraError without process group, for a model that is not enabled, or wrapped or placed already,
        for layers that the operators do not serve, merged adapters and owners that are none.
    """
    return place_on(model, owners, Group(group))


def place_on(model: nn.Module, owners: str | Sequence[int], together: Group) -> Report:
    """`place`, for a model of which a load may have left this rank's experts only."""
    found = _to_place(model)
    plans = {}
    for number, (where, module) in enumerate(found.items()):
        whose = owners_of(owners, module._moelora.experts, together.size, where)
        plans[where] = Ranks(together, where, number, whose)
    for where, module in found.items():
        keep(module, where, plans[where])
        module._moelora.placements = (plans[where], *module._moelora.placements)
    adopt(model)
    return attach.report(model)


def _to_place(model: nn.Module) -> dict[str, nn.Module]:
    """The expert layers by their names, all of them checked."""
    if isinstance(model, DistributedDataParallel):
        raise MoeloraError("place the model before it is wrapped by DistributedDataParallel")
    found = {
        name.removeprefix("base_model.model.").replace("base_layer.", "").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if vars(module).get("_moelora") is not None
    }
    if not found:
        raise MoeloraError("the model is not enabled: call moelora.enable(model) before place")
    for name, module in found.items():
        binding = module._moelora
        if binding.reason is not None:
            raise MoeloraError(f"{name} cannot be placed, it {binding.reason}")
        if _ranks(module) is not None:
            raise MoeloraError(f"{name} is placed already: experts cannot be placed twice")
        if any(getattr(placement, "ids", ()) for placement in binding.placements):
            raise MoeloraError(
                f"{name} has hot experts on an accelerator, which ranks do not share: place(model, hot=0)"
            )
        if getattr(module, "_is_expert_parallel", False):
            raise MoeloraError(f"{name} is spread by transformers' own expert parallelism already")
        for weight in projections(module):
            stored = weights.weight_of(module, weight)
            if isinstance(stored, PackedWeight) and standin.packed(module, weight) is None:
                raise MoeloraError(
                    f"{name}.{weight} is packed by another library: load it with moelora's loader"
                )
            if type(stored) not in (Tensor, nn.Parameter, PackedWeight):
                raise MoeloraError(
                    f"{name}.{weight} is a {type(stored).__name__}: place experts before sharding"
                )
    for several in adapters.wrappers(model).values():
        if any(wrapper.merged for wrapper in several):
            raise MoeloraError("adapters are merged into the experts' weights: unmerge them before place")
    return found


def keep(module: nn.Module, where: str, ranks: Ranks) -> None:
    """Let an experts module hold the weights of this rank's experts only."""
    for name in projections(module):
        if weights.is_spread(module, name):
            continue
        weight = weights.weight_of(module, name)
        text = told(f"{where}.{name}", ranks.group)
        shape, dtype = (len(ranks.owners), *weight.shape[1:]), module._parameters[name].dtype
        standin.spread(module, name, of_experts(weight, ranks.own), shape, dtype, text)


def told(name: str, group: Group) -> str:
    """What errors say of a weight that is no longer whole."""
    return f"{name} is {standin.SPREAD} over {group.size} ranks"


@torch.no_grad()
def of_experts(weight: Tensor | PackedWeight, own: list[int]) -> Tensor | PackedWeight:
    """A copy of some experts of a weight, in memory of their own; the same numbers."""
    if not isinstance(weight, PackedWeight):
        return weight.detach()[own].clone()
    if not own:
        return PackedWeight(*(t if t is None else t[:0].clone() for t in weight[:4]), *weight[4:])
    return stack([weight.experts(first, last + 1) for first, last in _runs(own)])


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of neighbours."""
    start = numbers[0]
    for number, following in zip(numbers, [*numbers[1:], None], strict=True):
        if following != number + 1:
            yield start, number
            start = following


def is_placed(model: nn.Module) -> bool:
    """Whether the model's experts are spread over ranks."""
    return any(_ranks(module) for module in model.modules())


def _ranks(module: nn.Module) -> Ranks | None:
    """The placement over ranks that an experts module has."""
    placements = vars(module)["_moelora"].placements if "_moelora" in vars(module) else ()
    return next((one for one in placements if isinstance(one, Ranks)), None)


def adopt(model: nn.Module) -> None:
    """Take over what has come to a placed model: adapters, and wrappers that DDP will look at."""
    for several in adapters.wrappers(model).values():
        for wrapper in several:
            ranks = _ranks(wrapper.get_base_layer())
            if ranks is not None:
                _keep_factors(wrapper, ranks)
                adapters.watch(wrapper, running=False)
    if is_placed(model):
        _anchor(model)
        saving.gathers(PeftModel)
        roots = [model]
        if isinstance(model, PeftModel):
            roots += [model.base_model, model.get_base_model()]
        for root in roots:
            before = set(getattr(root, "_ddp_params_and_buffers_to_ignore", ()))
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                root, sorted(before | _names(root))
            )


def _anchor(model: nn.Module) -> None:
    """DDP refuses a model in which it has nothing to reduce, as one with LoRA on experts alone would be."""
    local = _names(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained & local or trained - local:
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not hasattr(base, ANCHOR):
        device = next(base.parameters()).device
        base.register_parameter(ANCHOR, nn.Parameter(torch.zeros(1, device=device)))
    getattr(base, ANCHOR).requires_grad_(True)  # PEFT freezes what is not its own
    first = next(ranks for ranks in map(_ranks, model.modules()) if ranks is not None)
    first.anchor = getattr(base, ANCHOR)


def _keep_factors(wrapper: ParamWrapper, ranks: Ranks) -> None:
    """This rank's rows of A and columns of B, in parameters of their own."""
    for adapter, rank in wrapper.r.items():
        for layer, dim in ((wrapper.lora_A[adapter], 0), (wrapper.lora_B[adapter], 1)):
            if layer.weight.shape[dim] != rank * len(ranks.owners) and hasattr(layer, "_moelora_part"):
                gradients.own(layer, ranks.group)
                continue
            if hasattr(layer, "_moelora_part"):  # all experts are here
                continue
            layer._moelora_part = part = saving.Part(ranks, rank, dim)
            factor = layer.weight
            layer.weight = nn.Parameter(part.own(factor.detach()).clone(), requires_grad=factor.requires_grad)
            layer.register_load_state_dict_pre_hook(saving.take_own)
            gradients.own(layer, ranks.group)


def local_parameters(model: nn.Module) -> set[nn.Parameter]:
    """What each rank has of its own in a placed model: factors of its experts, and stand-ins of weights.

    For `fully_shard(..., ignored_params=local_parameters(model))`. DDP leaves them alone by itself.
    """
    here = {id(p) for _, _, p in _local(model) if isinstance(p, nn.Parameter)}
    return {parameter for parameter in model.parameters() if id(parameter) in here}


def _names(model: nn.Module) -> set[str]:
    """What DDP has no business with: what is here alone, and the frozen packed weights of linear layers."""
    packed = {
        f"{where}.{name}{end}"
        for where, _, name, beside in standin.installed(model)
        for end in ("", *(f"{standin.BESIDE}.{part}" for part, _ in beside.named_buffers()))
    }
    return packed | {f"{where}.{name}" for where, name, _ in _local(model)}


def _local(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(module, name, tensor) of every parameter and buffer that is another one on each rank."""
    for where, module in model.named_modules():
        if hasattr(module, "_moelora_part"):
            yield where, "weight", module.weight
        if _ranks(module) is not None:
            for name in projections(module):
                yield where, name, module._parameters[name]
                for part, buffer in standin.beside(module, name).named_buffers():
                    yield where, f"{name}{standin.BESIDE}.{part}", buffer
