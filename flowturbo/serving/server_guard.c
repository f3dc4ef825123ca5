/* Stands between the front ends of a server of release 24.10 and libtritonserver, preloaded.
 *
 * It keeps two kinds of requests from ending the server, and tells models the order in which outputs
 * were asked for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/auxv.h>

#define INVALID_ARGUMENT 3 /* TRITONSERVER_ERROR_INVALID_ARG */
#define MOST_ELEMENTS ((int64_t)1 << 24)

static void *library(const char *function) { return dlsym(RTLD_NEXT, function); }

static int in_program(void *address) {
  Dl_info of_address, of_program;
  return dladdr(address, &of_address) && dladdr((void *)getauxval(AT_ENTRY), &of_program) &&
         of_address.dli_fbase == of_program.dli_fbase;
}

/* The classification extension divides the bytes of an output by the size of its type, which is 0
 * for BYTES: the division ends the process (SIGFPE; mended in later releases, server pull request 8267).
 * Told a size of 1, the front ends come to their own check of the type and answer that it is not
 * supported. Nothing else in them asks for the size of BYTES. Callers outside the server's program,
 * such as the Python backend, are told 0 as ever.
 */
uint32_t TRITONSERVER_DataTypeByteSize(int type) {
  uint32_t (*function)(int) = (uint32_t (*)(int))library(__func__);
  uint32_t size = function ? function(type) : 0;
  return size == 0 && in_program(__builtin_return_address(0)) ? 1 : size;
}

/* The HTTP front end makes room for as many elements as a shape in JSON has, whatever the data: a
 * large shape ends the process (mended in later releases, server pull request 8174). It reads sizes
 * without a sign and keeps them with one: those of 2^63 and more arrive as negative ones.
 */
void *TRITONSERVER_InferenceRequestAddInput(void *request, const char *name, int type,
                                            const int64_t *shape, uint64_t dimensions) {
  typedef void *Add(void *, const char *, int, const int64_t *, uint64_t);
  typedef void *New(int, const char *);
  int64_t elements = 1;
  for (uint64_t k = 0; k < dimensions; k++) {
    if (shape[k] < 0 || (shape[k] > 0 && elements > MOST_ELEMENTS / shape[k])) {
      New *error = (New *)library("TRITONSERVER_ErrorNew");
      return error(INVALID_ARGUMENT, "the shape of an input must have at most 2^24 elements");
    }
    elements *= shape[k] > 0 ? shape[k] : 1;
  }
  return ((Add *)library(__func__))(request, name, type, shape, dimensions);
}

/* The server keeps the names of the outputs asked for as a set. A number for each, in a parameter of
 * the request, tells the order in which they were named (serving/forwarded.py).
 */
void *TRITONSERVER_InferenceRequestAddRequestedOutput(void *request, const char *name) {
  typedef void *Add(void *, const char *);
  typedef void *Set(void *, const char *, int64_t);
  static atomic_llong asked;
  char key[200];
  Set *set = (Set *)library("TRITONSERVER_InferenceRequestSetIntParameter");
  void *error = ((Add *)library(__func__))(request, name);
  int length = snprintf(key, sizeof key, "flowturbo_output_%s", name);
  if (error || !set || length >= (int)sizeof key || !in_program(__builtin_return_address(0))) {
    return error;
  }
  return set(request, key, atomic_fetch_add(&asked, 1));
}
