#include <array>

#include "ops/checks.h"

namespace moelora::ops {
namespace {

std::string text(int64_t v) { return std::to_string(v); }

ScalarType code_type(Code code) {
  switch (code) {
    case Code::int8: return ScalarType::Char;
    case Code::e4m3: return ScalarType::Float8_e4m3fn;
    default: return ScalarType::Byte;
  }
}

ScalarType scalar_type(ScaleType t) {
  switch (t) {
    case ScaleType::f32: return ScalarType::Float;
    case ScaleType::bf16: return ScalarType::BFloat16;
    case ScaleType::f16: return ScalarType::Half;
    case ScaleType::e4m3: return ScalarType::Float8_e4m3fn;
    default: return ScalarType::Byte;
  }
}

// "a, b or c"
std::string either(const std::vector<std::string>& names) {
  std::string all;
  for (size_t i = 0; i < names.size(); ++i) all += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
  return all;
}

std::string format_names() {
  std::vector<std::string> names;
  for (const FormatRow& row : kFormats) names.push_back(row.name);
  return either(names);
}

// As torch writes it.
std::string device_text(const Tensor& t) {
  const auto device = t.device();
  std::string index;
  if (device.index() >= 0) index.append(1, ':').append(text(device.index()));
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU: return "cpu" + index;
    case torch::headeronly::DeviceType::CUDA: return "cuda" + index;
    case torch::headeronly::DeviceType::Meta: return "meta" + index;
    default: return "of type " + text(static_cast<int64_t>(device.type())) + index;
  }
}

std::string because(const FormatRow& row) { return std::string(" when weight_format is ") + row.name; }

Scales scales_of(const Tensor& t, ScaleType type, int64_t rows_each, int64_t cols_each) {
  return {t.const_data_ptr(), type, t.stride(0), t.stride(1), t.stride(2), rows_each, cols_each};
}

}  // namespace

Weights Checker::weight(const WeightArgs& w, const char* lead_name, const Tensor& lead, const Routing& r) const {
  const FormatRow* row = nullptr;
  for (const FormatRow& each : kFormats)
    if (w.format == each.name) row = &each;
  require(row != nullptr, [&] { return "weight_format must be " + format_names() + ", got " + w.format; });
  if (row->format == Format::dense) {
    require(w.weight.dim() == 3,
            [&] { return "weight must be a 3-D tensor [E, N, K], got shape " + shape_text(w.weight); });
    like("weight", w.weight, lead_name, lead);
    experts(w.weight, r);
    absent("weight_scale", w.scale, because(*row));
    absent("weight_scale2", w.scale2, because(*row));
    absent("weight_zero", w.zero, because(*row));
    require(!w.transposed, [&] { return "weight_transposed must be False" + because(*row) + ", got True"; });
    return {experts_of(w.weight), {}, false};
  }
  Packed packed = codes(*row, w, lead_name, lead, r);
  scales(*row, w, packed);
  second_scales(*row, w, packed);
  zeros(*row, w, packed);
  const Weights stored{
      {nullptr, dtype_of(lead), r.experts, packed.rows, packed.cols, packed.rows * packed.cols, packed.cols, 1},
      packed,
      false};
  return w.transposed ? stored.transposed() : stored;
}

void Checker::experts(const Tensor& w, const Routing& r) const {
  require(w.size(0) == r.experts, [&] {
    return "weight must have " + text(r.experts) + " experts (the length of expert_offsets), got shape " +
           shape_text(w);
  });
  require(w.size(1) >= 1 && w.size(2) >= 1,
          [&] { return "weight must have N and K of at least 1, got shape " + shape_text(w); });
}

void Checker::absent(const char* name, const OptionalTensor& t, const std::string& why) const {
  require(!t, [&] { return name + std::string(" must be None") + why + ", got shape " + shape_text(*t); });
}

void Checker::beside_weight(const char* name, const Tensor& t, const Tensor& w) const {
  require(t.device() == w.device(), [&] {
    return std::string(name) + " must be on device " + device_text(w) + " (that of weight), got " + device_text(t);
  });
}

// Columns of codes are K, of a turned weight N.
Packed Checker::codes(const FormatRow& row, const WeightArgs& args, const char* lead_name, const Tensor& lead,
                      const Routing& r) const {
  const Tensor& w = args.weight;
  const int64_t numbers = 8 / bits_of(row.code);
  require(lead.scalar_type() != ScalarType::Double, [&] {
    return lead_name + (" must have dtype torch.bfloat16, torch.float16 or torch.float32" + because(row)) + ", got " +
           dtype_text(lead);
  });
  require(w.dim() == 3, [&] {
    return std::string("weight must be a 3-D tensor ") + (args.transposed ? "[E, K, N" : "[E, N, K") +
           (numbers == 2 ? "/2]" : "]") + ", got shape " + shape_text(w);
  });
  require(w.scalar_type() == code_type(row.code), [&] {
    return "weight must have dtype " + dtype_text(code_type(row.code)) + because(row) + ", got " + dtype_text(w);
  });
  experts(w, r);
  require(w.stride(2) == 1 || w.size(2) == 1,
          [&] { return "weight must have a last stride of 1" + because(row) + ", got " + text(w.stride(2)); });
  return {.codes = static_cast<const uint8_t*>(w.const_data_ptr()),
          .rows = w.size(1),
          .cols = w.size(2) * numbers,
          .expert_stride = w.stride(0),
          .row_stride = w.stride(1),
          .code = row.code,
          .values = args.zero ? row.values_with_zero : row.values};
}

int64_t Checker::group_size(const FormatRow& row, const Tensor& scale, int64_t cols, const char* letter) const {
  if (row.groups == Groups::fixed) {
    require(cols % row.group == 0, [&] {
      return std::string("weight must have ") + letter + " that is a multiple of " + text(row.group) + because(row) +
             ", got " + letter + "=" + text(cols);
    });
    return row.group;
  }
  const int64_t parts = scale.dim() == 3 ? scale.size(2) : 0,
                group = parts >= 1 && cols % parts == 0 ? cols / parts : 0;
  const bool power = row.groups == Groups::powers;
  require(
      group && (power ? group >= kLeastGroup && (group & (group - 1)) == 0 : group == cols || group % kLeastGroup == 0),
      [&] {
        return std::string("weight_scale must have a last size that divides ") + letter + "=" + text(cols) +
               " into groups of " + (power ? "a power of two, at least 32" : "all or of a multiple of 32") +
               because(row) + ", got shape " + shape_text(scale);
      });
  return group;
}

void Checker::scales(const FormatRow& row, const WeightArgs& args, Packed& packed) const {
  require(args.scale.has_value(), [&] { return "weight_scale must be given" + because(row) + ", got None"; });
  const Tensor& scale = *args.scale;
  beside_weight("weight_scale", scale, args.weight);
  std::vector<ScaleType> types(row.scales, row.scales + row.scale_types);
  if (row.second == Second::nested) types.push_back(ScaleType::indexed);
  const ScaleType* type = nullptr;
  std::vector<std::string> names;
  for (const ScaleType& t : types) {
    names.push_back(dtype_text(scalar_type(t)));
    if (scale.scalar_type() == scalar_type(t)) type = &t;
  }
  require(type != nullptr, [&] {
    return "weight_scale must have dtype " + either(names) + because(row) + ", got " + dtype_text(scale);
  });
  const char *rows = args.transposed ? "K" : "N", *cols = args.transposed ? "N" : "K";
  const int64_t e = args.weight.size(0), n = packed.rows, k = packed.cols;
  if (row.groups != Groups::tiles) {
    const int64_t group = group_size(row, scale, k, cols);
    shape("weight_scale", scale, std::array{e, n, k / group},
          "E=" + text(e) + ", " + rows + "=" + text(n) + ", " + cols + "/" + text(group));
    packed.scale = scales_of(scale, *type, 1, group);
    return;
  }
  const int64_t row_tiles = ceil_div(n, kTileSide), col_tiles = ceil_div(k, kTileSide);
  require(scale.dim() == 3 && scale.size(0) == e &&
              (scale.size(1) == n || scale.size(1) == row_tiles || scale.size(1) == 1) &&
              (scale.size(2) == col_tiles || scale.size(2) == 1),
          [&] {
            return "weight_scale must have shape [" + text(e) + ", " + text(n) + " or " + text(row_tiles) + " or 1, " +
                   text(col_tiles) + " or 1] (" + rows + "=" + text(n) + ", " + cols + "=" + text(k) +
                   " in tiles of 128), got " + shape_text(scale);
          });
  packed.scale = scales_of(scale, *type,
                           scale.size(1) == n   ? 1
                           : scale.size(1) == 1 ? n
                                                : kTileSide,
                           scale.size(2) == 1 ? k : kTileSide);
}

void Checker::second_scales(const FormatRow& row, const WeightArgs& args, Packed& packed) const {
  const bool nested = packed.scale.type == ScaleType::indexed;
  if (row.second == Second::none) return absent("weight_scale2", args.scale2, because(row));
  if (row.second == Second::nested && !nested)
    return absent("weight_scale2", args.scale2, " when weight_scale has dtype torch.float32");
  require(args.scale2.has_value(), [&] {
    return "weight_scale2 must be given" +
           (nested ? std::string(" when weight_scale has dtype torch.uint8") : because(row)) + ", got None";
  });
  const Tensor& second = *args.scale2;
  beside_weight("weight_scale2", second, args.weight);
  require(second.scalar_type() == ScalarType::Float,
          [&] { return "weight_scale2 must have dtype torch.float32, got " + dtype_text(second); });
  packed.scale2 = {};
  if (nested) {
    const int64_t scales = args.scale->numel();
    shape("weight_scale2", second, std::array{ceil_div(scales, kNestedBlock), int64_t{2}},
          "one for 256 of " + text(scales) + " scales");
    packed.scale_values = kNestedValues;
  } else {
    const int64_t e = args.weight.size(0);
    const char* letter = args.transposed ? "K" : "N";
    require(second.dim() == 2 && second.size(0) == e && second.size(1) >= 1 && packed.rows % second.size(1) == 0, [&] {
      return "weight_scale2 must have shape [" + text(e) + ", P] with P that divides " + letter + "=" +
             text(packed.rows) + ", got " + shape_text(second);
    });
  }
  packed.scale2 = matrix_of(second);
}

void Checker::zeros(const FormatRow& row, const WeightArgs& args, Packed& packed) const {
  if (row.values_with_zero == nullptr) return absent("weight_zero", args.zero, because(row));
  if (!args.zero) return;
  beside_weight("weight_zero", *args.zero, args.weight);
  require(args.zero->scalar_type() == ScalarType::Byte,
          [&] { return "weight_zero must have dtype torch.uint8, got " + dtype_text(*args.zero); });
  shape("weight_zero", *args.zero, std::array{args.scale->size(0), args.scale->size(1), args.scale->size(2)},
        "that of weight_scale");
  packed.zero = scales_of(*args.zero, ScaleType::u8, 1, packed.scale.cols_each);
}

}  // namespace moelora::ops
