// What TorchTPU loads in place of libtpu in the tests: a CPU plugin of PJRT, of which four things are changed.
//
//   create      the options that TorchTPU gives a client are those of a TPU's; a CPU client refuses them
//   extensions  TorchTPU asks the TpuTopology extension how many chips there are; a CPU plugin has none
//   compile     each program and its options go to a folder first, so that a test can count them, and have libtpu
//               compile them for a TPU that is not there
//   scans       TorchTPU writes cumsum as an associative chlo.scan, which this plugin aborts at, as it does not at others
//
// TORCH_RPA_PLUGIN names the CPU plugin and TORCH_RPA_PROGRAMS the folder. Structs of PJRT only grow at their end and
// carry their size, so that a header which is older than the plugin does.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pjrt_c_api.h"

namespace {

PJRT_Client_Create* create_client;
PJRT_Client_Compile* compile_program;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "tests/torchtpu/plugin.cpp: %s\n", what.c_str());
  std::abort();
}

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == 0) fail(std::string(name) + " is not set");
  return value;
}

PJRT_Error* create_without_options(PJRT_Client_Create_Args* args) {
  args->create_options = nullptr;
  args->num_options = 0;
  return create_client(args);
}

void write(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) fail("cannot write " + path);
}

// Takes the first free number, also beside other threads: "x" fails where there is a file already.
std::string new_program(const std::string& folder) {
  for (int number = 0;; number++) {
    char name[16];
    std::snprintf(name, sizeof name, "/%04d", number);
    if (std::FILE* file = std::fopen((folder + name + ".mlir").c_str(), "wbx")) {
      std::fclose(file);
      return folder + name;
    }
    if (number == 9999) fail("cannot write to " + folder);
  }
}

PJRT_Error* keep_and_compile(PJRT_Client_Compile_Args* args) {
  const std::string_view code(args->program->code, args->program->code_size);
  const std::string path = new_program(environment("TORCH_RPA_PROGRAMS"));
  write(path + ".options", {args->compile_options, args->compile_options_size});
  write(path + ".mlir", code);

  constexpr std::string_view associative = "is_associative", other = "is_associativ_";  // as long: no offset moves
  std::string changed(code);
  for (size_t at = 0; (at = changed.find(associative, at)) != std::string::npos;) {
    changed.replace(at, other.size(), other);
  }
  auto* program = const_cast<PJRT_Program*>(args->program);  // not a copy: it may be longer than this header's struct
  char* given = std::exchange(program->code, changed.data());
  PJRT_Error* error = compile_program(args);
  program->code = given;
  return error;
}

// The extension is a base and a table of functions, which this header does not declare. Those that count (processes,
// chips, cores, devices, of all and of this host) have arguments that start alike; there is one of each. Nothing asks
// for the others.
constexpr int kTpuTopologyExtension = 16, kNumFunctions = 32, kFirstCount = 7, kLastCount = 15;

struct CountArgs {
  size_t struct_size;
  const void* topology;
  int32_t count;
};

PJRT_Error* one(CountArgs* args) {
  args->count = 1;
  return nullptr;
}

struct TpuTopologyExtension {
  PJRT_Extension_Base base;
  PJRT_Error* (*functions[kNumFunctions])(CountArgs*);
};

const PJRT_Api* changed_api() {
  void* library = dlopen(environment("TORCH_RPA_PLUGIN"), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  auto* get = reinterpret_cast<const PJRT_Api* (*)()>(dlsym(library, "GetPjrtApi"));
  if (get == nullptr) fail(dlerror());
  const PJRT_Api* plugin = get();
  // The plugin's own struct, which may be longer than ours.
  static std::vector<char> bytes(reinterpret_cast<const char*>(plugin),
                                 reinterpret_cast<const char*>(plugin) + plugin->struct_size);
  auto* api = reinterpret_cast<PJRT_Api*>(bytes.data());

  static TpuTopologyExtension topology{};
  topology.base.struct_size = sizeof topology;
  topology.base.type = static_cast<PJRT_Extension_Type>(kTpuTopologyExtension);
  topology.base.next = api->extension_start;
  for (int i = kFirstCount; i <= kLastCount; i++) topology.functions[i] = one;
  api->extension_start = &topology.base;

  create_client = api->PJRT_Client_Create;
  api->PJRT_Client_Create = create_without_options;
  compile_program = api->PJRT_Client_Compile;
  api->PJRT_Client_Compile = keep_and_compile;
  return api;
}

}  // namespace

extern "C" const PJRT_Api* GetPjrtApi() {
  static const PJRT_Api* const api = changed_api();
  return api;
}
