// Runs a package of torch._inductor.aoti_compile_and_package that holds operators of deconv_ext, in
// a program without Python code: one float32 image batch from stdin to stdout, both as raw numbers.
//
//     exported LIBRARY PACKAGE BATCH CHANNELS HEIGHT WIDTH < input > output
//
// LIBRARY is deconv_ext.build_info()["path"]. Opening it registers the operators; since it holds
// the Python module too, the program is linked with Python's library, and never starts it:
//
//     g++ -std=c++20 examples/exported.cpp -o exported -I... -L... -Wl,--no-as-needed
//         -ltorch -ltorch_cpu -lc10 -ltorch_python -lpython3.x
//
// with the directories of torch.utils.cpp_extension.include_paths() and library_paths(), and
// sysconfig.get_config_var("LIBDIR").
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 7 || !dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    const char* error = argc == 7 ? dlerror() : "wants LIBRARY PACKAGE BATCH CHANNELS HEIGHT WIDTH";
    std::fprintf(stderr, "%s: %s\n", argv[0], error);
    return 1;
  }
  std::vector<int64_t> sizes;
  for (int i = 3; i < argc; ++i) sizes.push_back(std::atoll(argv[i]));
  at::Tensor image = at::empty(sizes, at::kFloat);
  const auto count = static_cast<size_t>(image.numel());
  if (std::fread(image.data_ptr(), sizeof(float), count, stdin) != count) {
    std::fprintf(stderr, "%s: stdin has less than %zu numbers\n", argv[0], count);
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const at::Tensor result = model.run({image}).at(0).contiguous();
  std::fwrite(result.const_data_ptr(), sizeof(float), static_cast<size_t>(result.numel()), stdout);
}
