// A stand-in for libnccl.so.2 on memory of the host, for tests without a GPU. Ranks are processes or threads of one machine; their
// bytes pass through a block of shared memory. A call is over when its function returns, as launches of the simulator are.
//
// It holds ranks to what NCCL leaves undefined: all make the same calls, with the same counts, and what one sends another is what
// that one receives. Environment:
//   STAND_IN_NCCL_LOG      every call is written to LOG.RANK, a line each
//   STAND_IN_NCCL_VERSION  the version's code (23203)
//   STAND_IN_NCCL_FAIL     RANK:WHAT:CALL, on that rank, at that all-gather or group, counted from 1:
//     refuse   the call fails on the rank alone
//     differ   the rank gives another count
//     die      the process is killed
//     error    the call does not end, and an asynchronous error is reported
//     connect  the communicator is not made
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { kMostRanks = 8, kSlot = 1 << 20, kMostMessages = 4096 };
enum { kOk = 0, kSystem = 2, kInvalidArgument = 4, kInvalidUsage = 5, kRemote = 6 };

typedef struct {
  char internal[128];
} Id;

// What a rank says of its call before bytes move: kind and bytes, and of a group what it sends each other one.
typedef struct {
  uint64_t kind, bytes, sent[kMostRanks], digest[kMostRanks];
} Call;

typedef struct {
  atomic_uint arrived, turn, aborted, ending;
  Call call[kMostRanks];
  char slot[kMostRanks][kSlot];
} Shared;

typedef struct {
  Shared* shared;
  int rank, size, async_error;
  uint64_t calls;
  FILE* log;
} Comm;

typedef struct {
  int send, peer;
  char* at;
  size_t bytes;
} Message;

const int routegrad_nccl_on_host = 1;

static _Thread_local char last_error[256];
static _Thread_local int group_depth;
static _Thread_local Comm* own_comm;
static _Thread_local Message messages[kMostMessages];
static _Thread_local int message_count;

static void note(Comm* c, const char* format, ...) {
  if (!c || !c->log) return;
  va_list list;
  va_start(list, format);
  vfprintf(c->log, format, list);
  va_end(list);
  fputc('\n', c->log);
  fflush(c->log);
}

static int fails(Comm* c, const char* what, uint64_t call) {
  const char* text = getenv("STAND_IN_NCCL_FAIL");
  int rank = -1;
  char kind[16] = "";
  unsigned long at = 0;
  return text && sscanf(text, "%d:%15[a-z]:%lu", &rank, kind, &at) == 3 && rank == c->rank && at == call &&
         !strcmp(kind, what);
}

static int refused(int status, const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(last_error, sizeof last_error, format, list);
  va_end(list);
  return status;
}

static void wait_a_little(unsigned turns) {
  const struct timespec nap = {0, 50000};
  if (turns < 100) sched_yield();
  else nanosleep(&nap, 0);
}

static int barrier(Comm* c) {
  Shared* s = c->shared;
  const unsigned turn = atomic_load(&s->turn);
  if (atomic_fetch_add(&s->arrived, 1) + 1 == (unsigned)c->size) {
    atomic_store(&s->arrived, 0);
    atomic_fetch_add(&s->turn, 1);
    return kOk;
  }
  for (unsigned turns = 0; atomic_load(&s->turn) == turn; ++turns) {
    // A rank that is through may have ended the communicator already.
    if (atomic_load(&s->aborted) && atomic_load(&s->turn) == turn)
      return refused(kRemote, "another rank ended the communicator");
    wait_a_little(turns);
  }
  return kOk;
}

// Fails as the test asks; else tells the other ranks of the call, whose own are there when it returns.
static int meet(Comm* c, Call own) {
  const uint64_t call = ++c->calls;
  if (atomic_load(&c->shared->aborted)) return refused(kRemote, "another rank ended the communicator");
  if (fails(c, "refuse", call)) return refused(kInvalidUsage, "call %lu was refused", (unsigned long)call);
  if (fails(c, "die", call)) kill(getpid(), SIGKILL);
  if (fails(c, "error", call)) {
    c->async_error = kRemote;
    for (unsigned turns = 0; !atomic_load(&c->shared->aborted); ++turns) wait_a_little(turns);
    return refused(kRemote, "another rank ended the communicator");
  }
  if (fails(c, "differ", call)) own.bytes += 4, own.sent[(c->rank + 1) % c->size] += 4;
  c->shared->call[c->rank] = own;
  const int met = barrier(c);
  if (met) return met;
  for (int r = 0; r < c->size; ++r) {
    const Call* other = &c->shared->call[r];
    if (other->kind != own.kind || (own.kind == 1 && other->bytes != own.bytes)) {
      refused(kOk, "rank %d calls %lu of %lu bytes, rank %d calls %lu of %lu", c->rank, (unsigned long)own.kind,
              (unsigned long)own.bytes, r, (unsigned long)other->kind, (unsigned long)other->bytes);
      barrier(c);
      return kInvalidUsage;
    }
  }
  return kOk;
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

int ncclGetVersion(int* version) {
  const char* text = getenv("STAND_IN_NCCL_VERSION");
  *version = text ? atoi(text) : 23203;
  return kOk;
}

const char* ncclGetErrorString(int status) {
  switch (status) {
    case kOk: return "no error";
    case kSystem: return "unhandled system error";
    case kInvalidArgument: return "invalid argument";
    case kInvalidUsage: return "invalid usage";
    case kRemote: return "remote process exited or there was a network error";
    default: return "unknown result code";
  }
}

const char* ncclGetLastError(void* comm) {
  (void)comm;
  return last_error;
}

int ncclGetUniqueId(Id* id) {
  static atomic_uint count;
  memset(id, 0, sizeof *id);
  snprintf(id->internal, sizeof id->internal, "/routegrad-nccl-%d-%u-%ld", getpid(), atomic_fetch_add(&count, 1), (long)time(0));
  const int file = shm_open(id->internal, O_CREAT | O_EXCL | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared))) return refused(kSystem, "no shared memory");
  close(file);
  return kOk;
}

int ncclCommInitRank(void** comm, int size, Id id, int rank) {
  *comm = 0;
  if (size < 1 || size > kMostRanks || rank < 0 || rank >= size) return refused(kInvalidArgument, "rank %d of %d", rank, size);
  const int file = shm_open(id.internal, O_RDWR, 0600);
  if (file < 0) return refused(kSystem, "no such communicator");
  Comm* c = calloc(1, sizeof *c);
  c->shared = mmap(0, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  c->rank = rank;
  c->size = size;
  const char* log = getenv("STAND_IN_NCCL_LOG");
  if (log) {
    char path[4096];
    snprintf(path, sizeof path, "%s.%d", log, rank);
    c->log = fopen(path, "a");
  }
  if (fails(c, "connect", 0)) {
    atomic_store(&c->shared->aborted, 1);
    return refused(kInvalidUsage, "Duplicate GPU detected");
  }
  const int met = barrier(c);
  if (rank == 0 || met) shm_unlink(id.internal);
  note(c, "connect %d", size);
  *comm = own_comm = c;
  return met;
}

int ncclCommCount(void* comm, int* size) {
  *size = ((Comm*)comm)->size;
  return kOk;
}

int ncclCommUserRank(void* comm, int* rank) {
  *rank = ((Comm*)comm)->rank;
  return kOk;
}

int ncclCommGetAsyncError(void* comm, int* status) {
  *status = ((Comm*)comm)->async_error;
  return kOk;
}

// As in NCCL, whose ranks of a node free their communicator together: waits for the other ranks, here for 20 s at most.
// Memory stays: another thread may be in a call.
static int end(Comm* c, const char* how) {
  note(c, "%s", how);
  Shared* s = c->shared;
  atomic_store(&s->aborted, 1);
  atomic_fetch_add(&s->ending, 1);
  const struct timespec nap = {0, 1000000};
  for (int turns = 0; turns < 20000 && atomic_load(&s->ending) < (unsigned)c->size; ++turns) nanosleep(&nap, 0);
  return kOk;
}

int ncclCommAbort(void* comm) { return end(comm, "abort"); }

int ncclCommDestroy(void* comm) { return end(comm, "destroy"); }

int ncclAllGather(const void* own, void* all, size_t count, int type, void* comm, void* stream) {
  Comm* c = comm;
  (void)stream;
  if (type != 1) return refused(kInvalidArgument, "not bytes");
  note(c, "all_gather %zu", count);
  const int met = meet(c, (Call){.kind = 1, .bytes = count});
  if (met) return met;
  for (size_t first = 0; first < count; first += kSlot) {
    const size_t n = least(kSlot, count - first);
    memcpy(c->shared->slot[c->rank], (const char*)own + first, n);
    int waited = barrier(c);
    if (waited) return waited;
    for (int r = 0; r < c->size; ++r) memcpy((char*)all + r * count + first, c->shared->slot[r], n);
    waited = barrier(c);
    if (waited) return waited;
  }
  return barrier(c);
}

int ncclGroupStart(void) {
  if (group_depth++ == 0) message_count = 0;
  return kOk;
}

static int add_message(Comm* c, int send, void* at, size_t bytes, int type, int peer) {
  if (type != 1 || peer < 0 || peer >= c->size) return refused(kInvalidArgument, "peer %d", peer);
  if (!group_depth || message_count == kMostMessages) return refused(kInvalidUsage, "no group, or a full one");
  note(c, "%s %d %zu", send ? "send" : "receive", peer, bytes);
  messages[message_count++] = (Message){send, peer, at, bytes};
  return kOk;
}

int ncclSend(const void* at, size_t count, int type, int peer, void* comm, void* stream) {
  (void)stream;
  return add_message(comm, 1, (void*)at, count, type, peer);
}

int ncclRecv(void* at, size_t count, int type, int peer, void* comm, void* stream) {
  (void)stream;
  return add_message(comm, 0, at, count, type, peer);
}

// Moves up to `room` bytes of the messages to or from a peer that follow the first `done`; how many there were.
static size_t move(int send, int peer, size_t done, char* slot, size_t room) {
  size_t moved = 0;
  for (int i = 0; i < message_count && moved < room; ++i) {
    const Message* m = &messages[i];
    if (m->send != send || m->peer != peer) continue;
    if (done >= m->bytes) {
      done -= m->bytes;
      continue;
    }
    const size_t n = least(m->bytes - done, room - moved);
    if (send) memcpy(slot + moved, m->at + done, n);
    else memcpy(m->at + done, slot + moved, n);
    moved += n;
    done = 0;
  }
  return moved;
}

// Unlike NCCL's, a group waits for the groups of all ranks, also where it is empty.
int ncclGroupEnd(void) {
  if (--group_depth > 0 || !own_comm) return kOk;
  Comm* c = own_comm;
  note(c, "group");
  Call own = {.kind = 2};
  uint64_t received[kMostRanks] = {0}, digest[kMostRanks] = {0};
  for (int i = 0; i < message_count; ++i) {
    const Message* m = &messages[i];
    uint64_t* bytes = m->send ? own.sent : received;
    uint64_t* lengths = m->send ? own.digest : digest;
    bytes[m->peer] += m->bytes;
    lengths[m->peer] = (lengths[m->peer] ^ m->bytes) * 1099511628211u;
  }
  const int met = meet(c, own);
  if (met) return met;
  int wrong = 0;
  uint64_t most = 0;
  for (int r = 0; r < c->size; ++r) {
    const Call* other = &c->shared->call[r];
    for (int to = 0; to < c->size; ++to) most = other->sent[to] > most ? other->sent[to] : most;
    if (other->sent[c->rank] != received[r] || other->digest[c->rank] != digest[r]) {
      refused(kOk, "rank %d receives %lu bytes of rank %d, which sends %lu", c->rank, (unsigned long)received[r], r,
              (unsigned long)other->sent[c->rank]);
      wrong = kInvalidUsage;
    }
  }
  int waited = barrier(c);
  if (wrong || waited) return wrong ? wrong : waited;
  const size_t piece = kSlot / c->size;
  for (size_t first = 0; first < most; first += piece) {
    for (int peer = 0; peer < c->size; ++peer) move(1, peer, first, c->shared->slot[c->rank] + peer * piece, piece);
    if ((waited = barrier(c))) return waited;
    for (int peer = 0; peer < c->size; ++peer) move(0, peer, first, c->shared->slot[peer] + c->rank * piece, piece);
    if ((waited = barrier(c))) return waited;
  }
  return kOk;
}
