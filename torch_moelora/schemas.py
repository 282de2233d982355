"""Every operator of the `moelora` namespace: name → schema, as the dispatcher reads it. Nothing else.

Shapes, dtypes and meaning of each argument: `reference.py` (what is computed) and `checks.py` (what is
    allowed).
"""

NAMESPACE = "moelora"

SCHEMAS: dict[str, str] = {
    "flatten_sort_count": (
        "(Tensor expert_idxs, int num_experts) -> (Tensor sorted_scattered_idxs, Tensor expert_offsets)"
    ),
    "scatter_lora": (
        "(Tensor x, Tensor weight, Tensor sorted_scattered_idxs, Tensor expert_offsets, int top_k, "
        "Tensor? lora_a=None, Tensor? lora_b=None, float scaling=1.0, "
        "Tensor? bias=None, Tensor? gates=None, bool x_grouped=False, bool y_grouped=False, "
        "Tensor? weight_scale=None, Tensor? weight_scale2=None, Tensor? weight_zero=None, "
        'str weight_format="dense", bool weight_transposed=False, bool sum_fp32=False) -> Tensor'
    ),
    "scatter_lora_dx": (
        "(Tensor dy, Tensor weight, Tensor sorted_scattered_idxs, Tensor expert_offsets, int top_k, "
        "Tensor? lora_a=None, Tensor? lora_b=None, float scaling=1.0, "
        "Tensor? bias=None, Tensor? gates=None, Tensor? x=None, "
        "bool x_grouped=False, bool y_grouped=False, "
        "Tensor? weight_scale=None, Tensor? weight_scale2=None, Tensor? weight_zero=None, "
        'str weight_format="dense", bool weight_transposed=False, bool sum_fp32=False) '
        "-> (Tensor dx, Tensor dgates)"
    ),
    "scatter_lora_dab": (
        "(Tensor dy, Tensor x, Tensor sorted_scattered_idxs, Tensor expert_offsets, int top_k, "
        "Tensor lora_a, Tensor lora_b, float scaling=1.0, Tensor? gates=None, "
        "bool x_grouped=False, bool y_grouped=False) -> (Tensor da, Tensor db)"
    ),
    "scatter_lora_backward": (
        "(Tensor dy, Tensor x, Tensor weight, Tensor sorted_scattered_idxs, Tensor expert_offsets, "
        "int top_k, Tensor lora_a, Tensor lora_b, float scaling=1.0, Tensor? bias=None, Tensor? gates=None, "
        "bool x_grouped=False, bool y_grouped=False, bool with_dgates=True, "
        "Tensor? weight_scale=None, Tensor? weight_scale2=None, Tensor? weight_zero=None, "
        'str weight_format="dense", bool weight_transposed=False, bool sum_fp32=False) '
        "-> (Tensor dx, Tensor dgates, Tensor da, Tensor db)"
    ),
    "scatter_lora_dw": (
        "(Tensor dy, Tensor x, Tensor sorted_scattered_idxs, Tensor expert_offsets, int top_k, "
        "Tensor? gates=None, bool x_grouped=False, bool y_grouped=False) -> Tensor"
    ),
    "scatter_lora_dbias": (
        "(Tensor dy, Tensor sorted_scattered_idxs, Tensor expert_offsets, int top_k, "
        "Tensor? gates=None, bool y_grouped=False) -> Tensor"
    ),
    "glu": (
        '(Tensor h, str act="silu", float alpha=1.0, float? limit=None, float up_shift=0.0, '
        "bool interleaved=False) -> Tensor"
    ),
    "glu_backward": (
        '(Tensor dy, Tensor h, str act="silu", float alpha=1.0, float? limit=None, float up_shift=0.0, '
        "bool interleaved=False) -> Tensor"
    ),
}
