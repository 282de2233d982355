// The table of weight formats.
#pragma once

#include "core/weights.h"

namespace moelora {

struct FormatRow {
  const char* name;  // as `weight_format` spells it
  Format format;
};

constexpr FormatRow kFormats[] = {
    {.name = "dense", .format = Format::dense},
};

}  // namespace moelora
