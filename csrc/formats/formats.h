// The table of weight formats.
#pragma once

#include "core/weights.h"
#include "formats/values.h"

namespace moelora {

// Which columns share a scale.
enum class Groups : uint8_t {
  none,
  powers,     // K / the last size of the scales: a power of two, at least kLeastGroup
  multiples,  // K / the last size of the scales: all K, or a multiple of kLeastGroup
  fixed,      // FormatRow::group
  tiles,      // rows and columns: 1, kTileSide or all of each
};
constexpr int64_t kLeastGroup = 32, kTileSide = 128;

// What scales are multiplied with.
enum class Second : uint8_t { none, nested, parts };  // nested: of indexed scales only

struct FormatRow {
  const char* name;  // as `weight_format` spells it
  Format format;
  Code code = Code::int8;
  const float* values = nullptr;            // of nibbles
  const float* values_with_zero = nullptr;  // the same where the weight has zero points; null: it takes none
  Groups groups = Groups::none;
  int64_t group = 0;
  ScaleType scales[3] = {};  // those it takes, besides indexed ones where they may be nested
  int scale_types = 0;
  Second second = Second::none;
};

constexpr FormatRow kFormats[] = {
    {.name = "dense", .format = Format::dense, .groups = Groups::none},
    {.name = "nf4",
     .format = Format::nf4,
     .code = Code::nibbles_high,
     .values = kNf4Values,
     .groups = Groups::powers,
     .scales = {ScaleType::f32},
     .scale_types = 1,
     .second = Second::nested},
    {.name = "fp4",
     .format = Format::fp4,
     .code = Code::nibbles_high,
     .values = kFp4Values,
     .groups = Groups::powers,
     .scales = {ScaleType::f32},
     .scale_types = 1,
     .second = Second::nested},
    {.name = "int4",
     .format = Format::int4,
     .code = Code::nibbles_low,
     .values = kInt4Values,
     .values_with_zero = kUint4Values,
     .groups = Groups::multiples,
     .scales = {ScaleType::f32, ScaleType::bf16, ScaleType::f16},
     .scale_types = 3},
    {.name = "mxfp4",
     .format = Format::mxfp4,
     .code = Code::nibbles_low,
     .values = kE2m1Values,
     .groups = Groups::fixed,
     .group = 32,
     .scales = {ScaleType::e8m0},
     .scale_types = 1},
    {.name = "nvfp4",
     .format = Format::nvfp4,
     .code = Code::nibbles_low,
     .values = kE2m1Values,
     .groups = Groups::fixed,
     .group = 16,
     .scales = {ScaleType::e4m3},
     .scale_types = 1,
     .second = Second::parts},
    {.name = "int8",
     .format = Format::int8,
     .code = Code::int8,
     .groups = Groups::multiples,
     .scales = {ScaleType::f32, ScaleType::bf16, ScaleType::f16},
     .scale_types = 3},
    {.name = "fp8",
     .format = Format::fp8,
     .code = Code::e4m3,
     .groups = Groups::tiles,
     .scales = {ScaleType::f32, ScaleType::bf16},
     .scale_types = 2},
};

}  // namespace moelora
