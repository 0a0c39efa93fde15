// Searches an exported index: TorchScript (.pt) or an AOTInductor package (.pt2). No Python is involved.
//
//   search MODEL QUERIES D OUT_D OUT_I [KERNEL]
//
// A package of a model that holds an index, and not its graph, calls the operators of the kernel: KERNEL is its library,
// the file that torch_ivf_module.native.info() names.
//
// QUERIES are rows of D raw little-endian float32; OUT_D gets raw float32 distances and OUT_I raw int64 ids, row by row.

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

torch::Tensor read_queries(const std::string& path, int64_t d) {
  if (d <= 0) {
    throw std::runtime_error("D must be at least 1, got " + std::to_string(d));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot read " + path);
  }
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const auto row = static_cast<size_t>(d) * sizeof(float);
  if (bytes.empty() || bytes.size() % row != 0) {
    throw std::runtime_error(path + " does not hold whole rows of " + std::to_string(d) + " float32");
  }
  const auto rows = static_cast<int64_t>(bytes.size() / row);
  return torch::from_blob(bytes.data(), {rows, d}, torch::kFloat32).clone();
}

void write(const std::string& path, const torch::Tensor& tensor) {
  const auto held = tensor.contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(held.data_ptr()), static_cast<std::streamsize>(held.nbytes()));
  if (!file) {
    throw std::runtime_error("cannot write " + path);
  }
}

std::vector<torch::Tensor> search(const std::string& model, const torch::Tensor& queries) {
  if (model.ends_with(".pt2")) {
    torch::inductor::AOTIModelPackageLoader package(model);
    return package.run({queries});
  }
  const auto found = torch::jit::load(model).forward({queries}).toTuple();
  return {found->elements()[0].toTensor(), found->elements()[1].toTensor()};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6 && argc != 7) {
    std::cerr << "usage: search MODEL QUERIES D OUT_D OUT_I [KERNEL]\n";
    return 2;
  }
  try {
    if (argc == 7 && dlopen(argv[6], RTLD_NOW) == nullptr) {
      throw std::runtime_error(dlerror());
    }
    torch::InferenceMode guard;
    const auto queries = read_queries(argv[2], std::stoll(argv[3]));
    const auto found = search(argv[1], queries);
    write(argv[4], found.at(0));
    write(argv[5], found.at(1));
    std::cout << "searched " << queries.size(0) << " queries, " << found.at(0).size(1) << " results each\n";
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
