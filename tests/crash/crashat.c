/*
 * Ends the process with SIGKILL just before its n-th change of anything below a directory: what a crash at that moment leaves is what is there.
 * Preloaded into a test's child, so that the code under test knows nothing of it.
 *
 *   CRASHAT_ROOT   the directory
 *   CRASHAT_N      which change; 0 for none
 *   CRASHAT_TORN   if set: where that change is a write, half of it is done
 *   CRASHAT_COUNT  a file for the number of changes, written when the process ends by itself
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *root;
static long target;
static int torn;
static atomic_long changes;

__attribute__((constructor)) static void begin(void)
{
    const char *n = getenv("CRASHAT_N");
    target = n ? atol(n) : 0;
    torn = getenv("CRASHAT_TORN") != NULL;
    root = getenv("CRASHAT_ROOT");
}

__attribute__((destructor)) static void end(void)
{
    const char *path = getenv("CRASHAT_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) {
        fprintf(file, "%ld\n", (long)changes);
        fclose(file);
    }
}

static int below(const char *path)
{
    return root && strncmp(path, root, strlen(root)) == 0;
}

static int fd_below(int fd)
{
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = root ? readlink(link, path, sizeof path - 1) : -1;
    if (n < 0)
        return 0;
    path[n] = 0;
    return below(path);
}

static int at_below(int dir, const char *path)
{
    return path[0] == '/' || dir == AT_FDCWD ? below(path) : fd_below(dir);
}

static int due(void)
{
    return atomic_fetch_add(&changes, 1) + 1 == target;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static void change(int counts)
{
    if (counts && due())
        die();
}

#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *bytes, size_t n)
{
    REAL(ssize_t, write, int, const void *, size_t);
    if (fd_below(fd) && due()) {
        if (torn)
            real(fd, bytes, n / 2);
        die();
    }
    return real(fd, bytes, n);
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t at)
{
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    if (fd_below(fd) && due()) {
        if (torn)
            real(fd, bytes, n / 2, at);
        die();
    }
    return real(fd, bytes, n, at);
}

ssize_t writev(int fd, const struct iovec *parts, int n)
{
    REAL(ssize_t, writev, int, const struct iovec *, int);
    change(fd_below(fd));
    return real(fd, parts, n);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t n, unsigned flags)
{
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned);
    change(fd_below(out));
    return real(in, from, out, to, n, flags);
}

int ftruncate64(int fd, off64_t size)
{
    REAL(int, ftruncate64, int, off64_t);
    change(fd_below(fd));
    return real(fd, size);
}

int fallocate64(int fd, int mode, off64_t at, off64_t n)
{
    REAL(int, fallocate64, int, int, off64_t, off64_t);
    change(fd_below(fd));
    return real(fd, mode, at, n);
}

static int makes(int flags)
{
    return (flags & (O_CREAT | O_TRUNC)) != 0;
}

int open64(const char *path, int flags, ...)
{
    REAL(int, open64, const char *, int, ...);
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    change(makes(flags) && below(path));
    return real(path, flags, mode);
}

int openat64(int dir, const char *path, int flags, ...)
{
    REAL(int, openat64, int, const char *, int, ...);
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    change(makes(flags) && at_below(dir, path));
    return real(dir, path, flags, mode);
}

int rename(const char *from, const char *to)
{
    REAL(int, rename, const char *, const char *);
    change(below(to));
    return real(from, to);
}

int unlink(const char *path)
{
    REAL(int, unlink, const char *);
    change(below(path));
    return real(path);
}

int unlinkat(int dir, const char *path, int flags)
{
    REAL(int, unlinkat, int, const char *, int);
    change(at_below(dir, path));
    return real(dir, path, flags);
}

int rmdir(const char *path)
{
    REAL(int, rmdir, const char *);
    change(below(path));
    return real(path);
}

int mkdir(const char *path, mode_t mode)
{
    REAL(int, mkdir, const char *, mode_t);
    change(below(path));
    return real(path, mode);
}

int symlink(const char *to, const char *path)
{
    REAL(int, symlink, const char *, const char *);
    change(below(path));
    return real(to, path);
}

int link(const char *from, const char *path)
{
    REAL(int, link, const char *, const char *);
    change(below(path));
    return real(from, path);
}

int linkat(int from_dir, const char *from, int dir, const char *path, int flags)
{
    REAL(int, linkat, int, const char *, int, const char *, int);
    change(at_below(dir, path));
    return real(from_dir, from, dir, path, flags);
}

int chmod(const char *path, mode_t mode)
{
    REAL(int, chmod, const char *, mode_t);
    change(below(path));
    return real(path, mode);
}
