// compile LIBTPU TOPOLOGY PROGRAM OPTIONS OUT: have libtpu compile a program that plugin.cpp kept, for a TPU that is not
// there, and write what it optimised it to, a serialized HloModuleProtoWithConfig. jaxlib cannot do it: TorchTPU writes
// StableHLO that is newer than the one it reads.

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "pjrt_c_api.h"

namespace {

const PJRT_Api* api;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "compile: %s\n", what.c_str());
  std::exit(1);
}

void check(PJRT_Error* error) {
  if (error == nullptr) return;
  PJRT_Error_Message_Args message{};
  message.struct_size = PJRT_Error_Message_Args_STRUCT_SIZE;
  message.error = error;
  api->PJRT_Error_Message(&message);
  fail(std::string(message.message, message.message_size));
}

std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

PJRT_TopologyDescription* topology_of(const std::string& name) {
  PJRT_Plugin_Initialize_Args initialize{};
  initialize.struct_size = PJRT_Plugin_Initialize_Args_STRUCT_SIZE;
  check(api->PJRT_Plugin_Initialize(&initialize));
  PJRT_TopologyDescription_Create_Args args{};
  args.struct_size = PJRT_TopologyDescription_Create_Args_STRUCT_SIZE;
  args.topology_name = name.data();
  args.topology_name_size = name.size();
  check(api->PJRT_TopologyDescription_Create(&args));
  return args.topology;
}

PJRT_Executable* compiled(PJRT_TopologyDescription* topology, std::string code, const std::string& options) {
  PJRT_Program program{};
  program.struct_size = PJRT_Program_STRUCT_SIZE;
  program.code = code.data();
  program.code_size = code.size();
  program.format = "mlir";
  program.format_size = 4;
  PJRT_Compile_Args args{};
  args.struct_size = PJRT_Compile_Args_STRUCT_SIZE;
  args.topology = topology;
  args.program = &program;
  args.compile_options = options.data();
  args.compile_options_size = options.size();
  check(api->PJRT_Compile(&args));
  return args.executable;
}

std::string optimized(PJRT_Executable* executable) {
  PJRT_Program program{};
  program.struct_size = PJRT_Program_STRUCT_SIZE;
  PJRT_Executable_OptimizedProgram_Args args{};
  args.struct_size = PJRT_Executable_OptimizedProgram_Args_STRUCT_SIZE;
  args.executable = executable;
  args.program = &program;
  check(api->PJRT_Executable_OptimizedProgram(&args));  // without a buffer it tells the size
  std::string code(program.code_size, 0);
  program.code = code.data();
  check(api->PJRT_Executable_OptimizedProgram(&args));
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) fail("usage: compile LIBTPU TOPOLOGY PROGRAM OPTIONS OUT");
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  api = reinterpret_cast<const PJRT_Api* (*)()>(dlsym(library, "GetPjrtApi"))();
  std::ofstream out(argv[5], std::ios::binary);
  out << optimized(compiled(topology_of(argv[2]), read(argv[3]), read(argv[4])));
  if (!out.flush()) fail(std::string("cannot write ") + argv[5]);
}
