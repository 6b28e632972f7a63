// The functions of MPI's standard ABI that routegrad calls, on top of MPICH's library: a libmpi_abi.so.0 for tests where no
// library has one yet. Handles and constants are those of the standard's mpi.h.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

typedef intptr_t Handle;
enum { WORLD = 0x101, BYTE = 0x247, ERRORS_RETURN = 0x142, SERIALIZED = 2048 };
enum { MPICH_WORLD = 0x44000000, MPICH_BYTE = 0x4c00010d, MPICH_ERRORS_RETURN = 0x54000001, MPICH_SERIALIZED = 2 };

static void* find(const char* name) {
  static void* library;
  if (!library) library = dlopen("libmpich.so.12", RTLD_NOW | RTLD_GLOBAL);
  void* function = library ? dlsym(library, name) : 0;
  if (!function) abort();
  return function;
}

// Any other handle than the expected one is the caller's error.
static int known(Handle given, Handle expected, int mpich) {
  if (given != expected) abort();
  return mpich;
}

// The world, or a communicator that MPI_Comm_split made.
static const Handle SPLIT = (Handle)1 << 41;  // wider than an int, as the standard's handles may be
static int communicator(Handle given) {
  return given & SPLIT ? (int)(uint32_t)given : known(given, WORLD, MPICH_WORLD);
}

int MPI_Init_thread(int* argc, char*** argv, int required, int* provided) {
  int (*call)(int*, char***, int, int*) = find("MPI_Init_thread");
  int level = 0, status = call(argc, argv, known(required, SERIALIZED, MPICH_SERIALIZED), &level);
  *provided = level >= MPICH_SERIALIZED ? SERIALIZED : 0;
  return status;
}

int MPI_Comm_rank(Handle comm, int* rank) {
  int (*call)(int, int*) = find("MPI_Comm_rank");
  return call(known(comm, WORLD, MPICH_WORLD), rank);
}

int MPI_Comm_size(Handle comm, int* size) {
  int (*call)(int, int*) = find("MPI_Comm_size");
  return call(known(comm, WORLD, MPICH_WORLD), size);
}

int MPI_Comm_set_errhandler(Handle comm, Handle handler) {
  int (*call)(int, int) = find("MPI_Comm_set_errhandler");
  return call(known(comm, WORLD, MPICH_WORLD), known(handler, ERRORS_RETURN, MPICH_ERRORS_RETURN));
}

int MPI_Comm_split(Handle comm, int color, int key, Handle* made) {
  int (*call)(int, int, int, int*) = find("MPI_Comm_split");
  int split = 0, status = call(communicator(comm), color, key, &split);
  *made = SPLIT | (uint32_t)split;
  return status;
}

int MPI_Iallgather(const void* own, int n, Handle type, void* all, int m, Handle t, Handle comm, Handle* request) {
  int (*call)(const void*, int, int, void*, int, int, int, int*) = find("MPI_Iallgather");
  int started = 0, byte = known(type, BYTE, MPICH_BYTE), other = known(t, BYTE, MPICH_BYTE);
  int status = call(own, n, byte, all, m, other, communicator(comm), &started);
  *request = ((Handle)1 << 40) | (uint32_t)started;  // wider than an int, as the standard's handles may be
  return status;
}

int MPI_Ialltoallv(const void* own, const int* counts, const int* places, Handle type, void* all, const int* taken,
                   const int* to, Handle t, Handle comm, Handle* request) {
  int (*call)(const void*, const int*, const int*, int, void*, const int*, const int*, int, int, int*) = find("MPI_Ialltoallv");
  int started = 0, byte = known(type, BYTE, MPICH_BYTE), other = known(t, BYTE, MPICH_BYTE);
  int status = call(own, counts, places, byte, all, taken, to, other, communicator(comm), &started);
  *request = ((Handle)1 << 40) | (uint32_t)started;
  return status;
}

int MPI_Test(Handle* request, int* done, void* status) {
  int (*call)(int*, int*, void*) = find("MPI_Test");
  int own = (int)(uint32_t)*request, result = call(&own, done, status);
  *request = ((Handle)1 << 40) | (uint32_t)own;
  return result;
}

int MPI_Get_library_version(char* text, int* length) {
  return ((int (*)(char*, int*))find("MPI_Get_library_version"))(text, length);
}

int MPI_Get_processor_name(char* text, int* length) {
  return ((int (*)(char*, int*))find("MPI_Get_processor_name"))(text, length);
}

int MPI_Error_string(int code, char* text, int* length) {
  return ((int (*)(int, char*, int*))find("MPI_Error_string"))(code, text, length);
}

int MPI_Finalize(void) { return ((int (*)(void))find("MPI_Finalize"))(); }
