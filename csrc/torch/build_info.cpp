#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

#ifndef TORCH_CSB_CUDA_VERSION
#define TORCH_CSB_CUDA_VERSION "none"
#endif
#ifndef TORCH_CSB_CUDA_ARCHS
#define TORCH_CSB_CUDA_ARCHS "none"
#endif

namespace {

// What this library was built with, "key=value" joined by ";".
std::string build_info() {
  return std::string("cuda=" TORCH_CSB_CUDA_VERSION ";archs=" TORCH_CSB_CUDA_ARCHS ";cpu=") + csb::cpu::capability();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torch_csb, CompositeExplicitAutograd, library) {
  library.impl("build_info", TORCH_BOX(&build_info));
}
