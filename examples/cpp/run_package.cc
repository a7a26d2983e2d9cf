// Runs a package folder with libtvm_runtime and libtvm_ffi alone; see README.md for how to build and call it.

#include <dlpack/dlpack.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace fs = std::filesystem;
using Object = ffi::json::Object;
using List = ffi::json::Array;

constexpr size_t kTensorAlignment = 64;   // what TVM's kernels may assume
constexpr int kPooledAllocator = 2;       // tvm/runtime/memory/memory_manager.h
constexpr int kShareAllListedCpus = -3;   // ThreadGroup::kSpecifyThreadShareAllCore

std::string Text(const Object& object, const char* key) {
  return object[ffi::String(key)].cast<ffi::String>();
}
Object Child(const Object& object, const char* key) { return object[ffi::String(key)].cast<Object>(); }
List Items(const Object& object, const char* key) { return object[ffi::String(key)].cast<List>(); }

std::string ReadFile(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(stream), {}};
}

Object ReadManifest(const fs::path& package) {
  ffi::String error;
  ffi::Any value = ffi::json::Parse(ReadFile(package / "manifest.json"), &error);
  if (!error.empty()) throw std::runtime_error("manifest.json: " + std::string(error));
  Object manifest = value.cast<Object>();
  if (Text(manifest, "format") != "optimizer-package") throw std::runtime_error("this is not a package");
  const auto version = manifest[ffi::String("format_version")].cast<int64_t>();
  if (version != 6 && version != 7) {
    throw std::runtime_error("the package has another format version");
  }
  return manifest;
}

// Throws unless the CPU has every feature that the package's code uses: an illegal instruction would come too late.
void CheckFeatures(const Object& requirements) {
  std::set<std::string> present;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    present.insert(std::istream_iterator<std::string>(words), {});
  }
#if defined(__x86_64__) && defined(__linux__)
  // A process asks Linux before it uses AMX's tile registers: arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
  if (present.count("amx_tile") && syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    for (const char* name : {"amx_tile", "amx_bf16", "amx_int8"}) present.erase(name);
  }
#endif
  std::string missing;
  for (const ffi::Any& feature : Items(requirements, "cpu_features")) {
    std::string name = feature.cast<ffi::String>();
    if (!present.count(name)) missing += " " + name;
  }
  if (!missing.empty()) throw std::runtime_error("this machine lacks the CPU features" + missing);
  if (Text(requirements, "device") != "cpu") throw std::runtime_error("this example runs packages for the CPU");
}

// One thread per physical core; by itself TVM uses half of the hardware threads on x86.
void UseAllCores() {
  std::set<std::string> cores;
  ffi::Array<ffi::String> cpus;
  for (int cpu = 0;; ++cpu) {
    fs::path folder = "/sys/devices/system/cpu/cpu" + std::to_string(cpu);
    if (!fs::exists(folder)) break;
    std::ifstream stream(folder / "topology/thread_siblings_list");
    std::string siblings = std::to_string(cpu);
    std::getline(stream, siblings);
    if (cores.insert(siblings).second) cpus.push_back(std::to_string(cpu));
  }
  if (cpus.empty()) return;
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareAllListedCpus, static_cast<int>(cpus.size()), cpus);
}

// Lends memory that outlives all tensors to a tensor.
struct Borrowed {
  void* data;
  void AllocData(DLTensor* tensor) const { tensor->data = data; }
  void FreeData(DLTensor*) const {}
};

struct Owned {
  size_t bytes;
  void AllocData(DLTensor* tensor) const {
    size_t rounded = (bytes + kTensorAlignment) / kTensorAlignment * kTensorAlignment;
    tensor->data = std::aligned_alloc(kTensorAlignment, rounded);
    if (tensor->data == nullptr) throw std::bad_alloc();
  }
  void FreeData(DLTensor* tensor) const { std::free(tensor->data); }
};

constexpr DLDevice kCpu{kDLCPU, 0};

// Four-bit tensors travel as one byte an element.
DLDataType DeviceDtype(const std::string& name) {
  if (name == "int4") return {kDLInt, 8, 1};
  if (name == "uint4") return {kDLUInt, 8, 1};
  return ffi::StringToDLDataType(name);
}

std::vector<int64_t> Shape(const List& dimensions) {
  std::vector<int64_t> shape;
  for (const ffi::Any& dimension : dimensions) shape.push_back(dimension.cast<int64_t>());
  return shape;
}

// Returns all weights as tensors over the mapped file, in manifest order.
ffi::Array<ffi::Any> MapWeights(const fs::path& package, const Object& manifest) {
  fs::path path = package / Text(manifest, "weights_file");
  size_t bytes = fs::file_size(path);
  char* data = nullptr;
  if (bytes != 0) {
    int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) throw std::runtime_error("cannot read " + path.string());
    void* mapped = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, descriptor, 0);
    close(descriptor);
    if (mapped == MAP_FAILED) throw std::runtime_error("cannot map " + path.string());
    data = static_cast<char*>(mapped);
  }
  ffi::Array<ffi::Any> weights;
  for (const ffi::Any& item : Items(manifest, "weights")) {
    Object record = item.cast<Object>();
    int64_t offset = record[ffi::String("offset")].cast<int64_t>();
    int64_t length = record[ffi::String("bytes")].cast<int64_t>();
    if (offset < 0 || length < 0 || static_cast<size_t>(offset + length) > bytes) {
      throw std::runtime_error("a weight ends beyond " + path.string());
    }
    if (offset % kTensorAlignment) throw std::runtime_error("a weight is not aligned in " + path.string());
    weights.push_back(ffi::Tensor::FromNDAlloc(Borrowed{data + offset}, ffi::Shape(Shape(Items(record, "shape"))),
                                               DeviceDtype(Text(record, "dtype")), kCpu));
  }
  return weights;
}

struct Input {
  std::vector<int64_t> shape;
  std::string data;
};

// Parses NAME=2x3=FILE (NAME==FILE for a scalar).
std::pair<std::string, Input> ParseInput(const std::string& argument) {
  size_t second = argument.rfind('='), first = argument.rfind('=', second - 1);
  if (second == std::string::npos || first == std::string::npos) {
    throw std::runtime_error("'" + argument + "' is not NAME=DIMENSIONS=FILE");
  }
  Input input{{}, ReadFile(argument.substr(second + 1))};
  std::istringstream dimensions(argument.substr(first + 1, second - first - 1));
  for (std::string number; std::getline(dimensions, number, 'x');) input.shape.push_back(std::stoll(number));
  return {argument.substr(0, first), input};
}

ffi::Tensor MakeTensor(const Input& input, const std::string& name, DLDataType dtype) {
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Owned{input.data.size()}, ffi::Shape(input.shape), dtype, kCpu);
  if (ffi::GetDataSize(*tensor.GetDLTensorPtr()) != input.data.size()) {
    throw std::runtime_error("the file for " + name + " does not hold a tensor of that shape");
  }
  std::memcpy(tensor.data_ptr(), input.data.data(), input.data.size());
  return tensor;
}

void Write(const ffi::Tensor& tensor, const std::string& name, const fs::path& path) {
  const DLTensor& array = *tensor.GetDLTensorPtr();
  const char* data = static_cast<const char*>(array.data) + array.byte_offset;
  std::ofstream(path, std::ios::binary).write(data, ffi::GetDataSize(array));
  std::cout << name << ": " << ffi::DLDataTypeToString(array.dtype) << "[";
  for (int axis = 0; axis < array.ndim; ++axis) std::cout << (axis ? ", " : "") << array.shape[axis];
  std::cout << "] -> " << path.string() << "\n";
}

int Run(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: run_package PACKAGE OUTPUT_FOLDER [NAME=DIMENSIONS=FILE ...]\n";
    return 2;
  }
  fs::path package = argv[1], outputs = argv[2];
  Object manifest = ReadManifest(package);
  CheckFeatures(Child(manifest, "requirements"));
  std::map<std::string, Input> given;
  for (int index = 3; index < argc; ++index) given.insert(ParseInput(argv[index]));

  UseAllCores();
  ffi::Module library = ffi::Module::LoadFromFile((package / Text(manifest, "library")).string());
  ffi::Module machine = (*library->GetFunction("vm_load_executable"))().cast<ffi::Module>();
  (*machine->GetFunction("vm_initialization"))(static_cast<int>(kDLCPU), 0, kPooledAllocator);

  Object entry = Items(manifest, "entry_points")[0].cast<Object>();
  if (Items(entry, "caches").size() != 0) {
    throw std::runtime_error("the package appends to buffers of keys and values; compile it with --kv-cache returned");
  }
  std::vector<ffi::Any> arguments;
  for (const ffi::Any& item : Items(entry, "inputs")) {
    Object spec = item.cast<Object>();
    auto found = given.find(Text(spec, "name"));
    if (found == given.end()) throw std::runtime_error("the input " + Text(spec, "name") + " is missing");
    arguments.push_back(MakeTensor(found->second, found->first, DeviceDtype(Text(spec, "dtype"))));
  }
  arguments.push_back(MapWeights(package, manifest));
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  machine->GetFunction(Text(entry, "name")).value().CallPacked(views.data(), static_cast<int>(views.size()), &result);

  List specs = Items(entry, "outputs");
  auto single = result.as<ffi::Tensor>();
  ffi::Array<ffi::Any> results = single ? ffi::Array<ffi::Any>{*single} : result.cast<ffi::Array<ffi::Any>>();
  for (size_t index = 0; index < results.size(); ++index) {
    Write(results[index].cast<ffi::Tensor>(), Text(specs[index].cast<Object>(), "name"),
          outputs / (std::to_string(index) + ".bin"));
  }
  return 0;
}

int main(int argc, char** argv) {
  try {
    return Run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
