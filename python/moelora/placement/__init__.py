"""Where a model's experts are: `place` spreads them over the ranks of torch.distributed.

`owners` says who has which expert, `exchange` sends tokens there and results back, `ranks` is a layer's
placement, `spreading` takes a model's weights and adapters apart, `gradients`, `saving` and `reading` do what
DDP, PEFT and transformers would do if every rank had every expert. Nothing here is below torch.distributed.
`beside` is for experts in host memory beside an accelerator.
"""

from moelora.placement.placing import place
from moelora.placement.spreading import local_parameters

__all__ = ["local_parameters", "place"]
