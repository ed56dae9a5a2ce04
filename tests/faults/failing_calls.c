/* Makes one call of the system fail, and moves the clock. Preloaded into a process by tests/faults/failing_calls.py, which maps the same
 * file: `kind` and `at` select the call, `counts` counts the calls of each kind since the counters were set to 0.
 *
 * Only connections of clients count (IPv4 sockets), not those to the engine, and of files the log and those that are
 * opened by name.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum { SEND, RECV, WRITE, FORK, ACCEPT, OPEN, NUM_KINDS };

struct control {
    volatile int armed;  /* count, and fail the call that `kind` and `at` say */
    volatile int kind, at, error;
    volatile int clock_offset; /* seconds */
    volatile int counts[NUM_KINDS];
};

static struct control *control;
static pid_t owner;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("FAILING_CALLS");
    int fd = path ? open(path, O_RDWR) : -1;
    if (fd < 0)
        return;
    void *map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    owner = getpid();
    if (map != MAP_FAILED)
        control = map;
}

/* Count a call. Return whether it must fail, with errno set. Calls of child processes do not count. */
static int fails(int kind) {
    if (!control || !control->armed || getpid() != owner)
        return 0;
    int number = __atomic_add_fetch(&control->counts[kind], 1, __ATOMIC_SEQ_CST);
    if (control->kind != kind || control->at != number)
        return 0;
    errno = control->error;
    return 1;
}

static int is_of_client(int fd) {
    int domain = 0;
    socklen_t size = sizeof domain;
    int before = errno;
    int failed = getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size);
    errno = before;
    return !failed && domain == AF_INET;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t send(int fd, const void *data, size_t size, int flags) {
    return is_of_client(fd) && fails(SEND) ? -1 : NEXT(send)(fd, data, size, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    return is_of_client(fd) && fails(SEND) ? -1 : NEXT(sendmsg)(fd, message, flags);
}

ssize_t recv(int fd, void *data, size_t size, int flags) {
    return is_of_client(fd) && fails(RECV) ? -1 : NEXT(recv)(fd, data, size, flags);
}

ssize_t write(int fd, const void *data, size_t size) {
    return fd == 2 && fails(WRITE) ? -1 : NEXT(write)(fd, data, size);
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
    return is_of_client(fd) && fails(ACCEPT) ? -1 : NEXT(accept4)(fd, address, size, flags);
}

pid_t fork(void) { return fails(FORK) ? -1 : NEXT(fork)(); }

/* The caller's frame must survive until the child has called exec, which only a real fork allows here. */
pid_t vfork(void) { return fork(); }

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = NEXT(clock_gettime)(clock, time);
    if (!result && control && clock == CLOCK_REALTIME)
        time->tv_sec += control->clock_offset;
    return result;
}

#define OPEN_FUNCTION(name)                                                                                           \
    int name(const char *path, int flags, ...) {                                                                      \
        va_list rest;                                                                                                 \
        va_start(rest, flags);                                                                                        \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;                                       \
        va_end(rest);                                                                                                 \
        return fails(OPEN) ? -1 : NEXT(name)(path, flags, mode);                                                      \
    }

OPEN_FUNCTION(open)
OPEN_FUNCTION(open64)
