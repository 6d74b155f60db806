/* A disk on which the catalogue cannot be locked, as some network disks are: preloaded into a process, it makes
 * fcntl refuse every lock on a file of that name with ENOLCK. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int refuses(int fd, int cmd) {
    char link[64], path[4096];
    ssize_t length;
    if (cmd != F_SETLK && cmd != F_SETLKW && cmd != F_GETLK)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return strstr(path, "catalogue.sqlite") != NULL;
}

static int pass_on(const char *name, int fd, int cmd, void *argument) {
    int (*real)(int, int, ...) = (int (*)(int, int, ...))dlsym(RTLD_NEXT, name);
    if (refuses(fd, cmd)) {
        errno = ENOLCK;
        return -1;
    }
    return real(fd, cmd, argument);
}

#define WRAPPED(name)                                   \
    int name(int fd, int cmd, ...) {                    \
        va_list rest;                                   \
        void *argument;                                 \
        va_start(rest, cmd);                            \
        argument = va_arg(rest, void *);                \
        va_end(rest);                                   \
        return pass_on(#name, fd, cmd, argument);       \
    }

WRAPPED(fcntl)
WRAPPED(fcntl64)
