/* A disk below FULL_UNDER that takes so many changes and then none: the calls of libc that change files, in the way.
 *
 * FULL_STATE is a file of 32 bytes that all processes share: changes so far, changes that are taken, the error's number,
 * and when the first change failed, in nanoseconds of CLOCK_MONOTONIC. FULL_FAILED gets the path of each that failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct state {
    int64_t changes, taken, error, failed_ns;
};
static struct state *state;
static const char *under;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FULL_STATE");
    under = getenv("FULL_UNDER");
    int file = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0 || !under) return;
    void *found = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    state = found == MAP_FAILED ? NULL : found;
    syscall(SYS_close, file);
}

static void note(const char *path) {
    struct timespec now;
    int64_t none = 0;
    clock_gettime(CLOCK_MONOTONIC, &now);
    __atomic_compare_exchange_n(&state->failed_ns, &none, now.tv_sec * 1000000000LL + now.tv_nsec, 0, __ATOMIC_SEQ_CST,
                                __ATOMIC_SEQ_CST);
    const char *list = getenv("FULL_FAILED");
    int file = list ? syscall(SYS_openat, AT_FDCWD, list, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (file < 0) return;
    char line[PATH_MAX + 1];
    int length = snprintf(line, sizeof line, "%s\n", path);
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

/* Whether a change of a path is refused; errno is set then. */
static int refused(const char *path) {
    if (!state || strncmp(path, under, strlen(under)) != 0) return 0;
    if (__atomic_add_fetch(&state->changes, 1, __ATOMIC_SEQ_CST) <= state->taken) return 0;
    note(path);
    errno = (int)state->error;
    return 1;
}

static int refused_at(int folder, const char *path) {
    char base[PATH_MAX], whole[2 * PATH_MAX], link[64];
    if (!state || !path) return 0;
    if (path[0] == '/') return refused(path);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = folder == AT_FDCWD ? (getcwd(base, sizeof base) ? (ssize_t)strlen(base) : -1)
                                        : readlink(link, base, sizeof base - 1);
    if (length < 0) return 0;
    base[length] = 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return refused(whole);
}

static int refused_file(int file) {
    char link[64], path[PATH_MAX];
    if (!state) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return refused(path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define MODE(flags, mode)                                                                                              \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                                                             \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }
#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        MODE(flags, mode)                                                                                              \
        if (CHANGES(flags) && refused_at(AT_FDCWD, path)) return -1;                                                   \
        return NEXT(name)(path, flags, mode);                                                                          \
    }
#define OPENAT(name)                                                                                                   \
    int name(int folder, const char *path, int flags, ...) {                                                           \
        MODE(flags, mode)                                                                                              \
        if (CHANGES(flags) && refused_at(folder, path)) return -1;                                                     \
        return NEXT(name)(folder, path, flags, mode);                                                                  \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") && refused_at(AT_FDCWD, path) ? NULL : NEXT(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return strpbrk(mode, "wa+") && refused_at(AT_FDCWD, path) ? NULL : NEXT(fopen64)(path, mode);
}
ssize_t write(int file, const void *bytes, size_t size) {
    return refused_file(file) ? -1 : NEXT(write)(file, bytes, size);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return refused_file(file) ? -1 : NEXT(writev)(file, parts, count);
}
ssize_t pwrite(int file, const void *bytes, size_t size, off_t place) {
    return refused_file(file) ? -1 : NEXT(pwrite)(file, bytes, size, place);
}
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t place) {
    return refused_file(file) ? -1 : NEXT(pwrite64)(file, bytes, size, place);
}
int ftruncate(int file, off_t size) { return refused_file(file) ? -1 : NEXT(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return refused_file(file) ? -1 : NEXT(ftruncate64)(file, size); }
int mkdir(const char *path, mode_t mode) {
    return refused_at(AT_FDCWD, path) ? -1 : NEXT(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return refused_at(folder, path) ? -1 : NEXT(mkdirat)(folder, path, mode);
}
int rename(const char *old, const char *path) {
    return refused_at(AT_FDCWD, path) ? -1 : NEXT(rename)(old, path);
}
int renameat(int from, const char *old, int folder, const char *path) {
    return refused_at(folder, path) ? -1 : NEXT(renameat)(from, old, folder, path);
}
/* A full disk still lets go of files; one that is read-only does not. */
int unlink(const char *path) {
    return state && state->error == EROFS && refused_at(AT_FDCWD, path) ? -1 : NEXT(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    return state && state->error == EROFS && refused_at(folder, path) ? -1 : NEXT(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    return state && state->error == EROFS && refused_at(AT_FDCWD, path) ? -1 : NEXT(rmdir)(path);
}
