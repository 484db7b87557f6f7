/* A load for echo servers: echo_load PORT KIND CONNECTIONS SIZE SECONDS SERVER_PID
 *
 * KIND is one of
 *
 *     echo      each connection sends a message of SIZE bytes, waits until all of it has come back, and sends the next
 *     connect   the same with a new connection for each message
 *
 * CONNECTIONS of them at a time. Prints four numbers for each slice of 50 ms:
 *
 *     the messages that came back in it
 *     its length in seconds
 *     CPU seconds that the server took in it
 *     seconds in it during which the server or this load could have run, but something else had the CPU
 *
 * or a complaint on stderr, and ends with status 1.
 *
 * Every byte that comes back is compared with what was sent. Each message begins somewhere else in a block of random
 * bytes, so that an echo of an older message, or of another connection's, is seen to be wrong.
 *
 * This load never sleeps: a server that answers a sleeping client has to wake another CPU, which with a single
 * connection takes longer than the answer. Nor does it run out of source ports. Those of closed connections are blocked
 * for a minute, so it takes address and port itself, each pair once, from 127.0.0.0/8.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PLACES 4096   /* where in the block of random bytes a message may begin */
#define SLICE 0.05    /* seconds */
#define SILENCE 10.0  /* seconds without an echo after which the server is taken to be stuck */
#define FIRST_PORT 1024
#define PORTS (65536 - FIRST_PORT)

struct connection {
    int fd;
    size_t sent, received;
    unsigned place;
};

static struct sockaddr_in server;
static size_t size;
static int reconnects, stopping;
static unsigned char *block, *input;
static int poller;
static struct connection *connections;
static unsigned long long requests;
static int waiting; /* messages whose echo is not complete */

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "echo_load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    exit(1);
}

static double now(clockid_t clock)
{
    struct timespec time;
    if (clock_gettime(clock, &time))
        fail("clock: %s", strerror(errno));
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* Seconds for which the process was ready to run, but did not; 0 where the system does not tell. */
static double waited(int pid)
{
    char path[64];
    unsigned long long ran, delayed = 0;
    snprintf(path, sizeof path, "/proc/%d/schedstat", pid);
    FILE *file = fopen(path, "r");
    if (file) {
        if (fscanf(file, "%llu %llu", &ran, &delayed) != 2)
            delayed = 0;
        fclose(file);
    }
    return delayed * 1e-9;
}

/* An address of our own for the next connection. They are counted from the time in units of 10 us, which passes faster
 * than they are used up: so the next run has others. */
static struct sockaddr_in source(void)
{
    static uint64_t number;
    if (!number)
        number = now(CLOCK_REALTIME) * 1e5;
    number++;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(FIRST_PORT + number % PORTS)};
    address.sin_addr.s_addr = htonl(0x7f000002u + number / PORTS % 0xfffff0u);
    return address;
}

static void open_connection(struct connection *c)
{
    int on = 1;
    for (int attempt = 0;; attempt++) {
        struct sockaddr_in from = source();
        if ((c->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0)
            fail("socket: %s", strerror(errno));
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (!bind(c->fd, (struct sockaddr *)&from, sizeof from)
            && !connect(c->fd, (struct sockaddr *)&server, sizeof server))
            break;
        if ((errno != EADDRINUSE && errno != EADDRNOTAVAIL) || attempt == 1000)
            fail("connect: %s", strerror(errno));
        close(c->fd);
    }
    /* Edge-triggered, so that the registration never has to be changed. */
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event))
        fail("epoll_ctl: %s", strerror(errno));
}

static void send_more(struct connection *c)
{
    while (c->sent < size) {
        ssize_t n = send(c->fd, block + c->place + c->sent, size - c->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            fail("send: %s", strerror(errno));
        c->sent += n;
    }
}

static void next_message(struct connection *c)
{
    c->sent = c->received = 0;
    c->place = (c->place + 1031) % PLACES;
    waiting++;
    send_more(c);
}

/* Take in what has come. One byte more than is due is asked for, so as to see it if the server sends too much. */
static void receive_more(struct connection *c)
{
    while (c->received < c->sent) {
        ssize_t n = recv(c->fd, input, size + 1 - c->received, MSG_DONTWAIT);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            fail("recv: %s", strerror(errno));
        if (n == 0)
            fail("the server has closed a connection");
        if (c->received + n > c->sent)
            fail("the server has sent more than it got");
        if (memcmp(input, block + c->place + c->received, n))
            fail("what came back is not what was sent");
        c->received += n;
    }
}

static void turn(struct connection *c)
{
    if (c->received == size)
        return; /* the last message is over: this says that there is room to write, which we know */
    send_more(c);
    receive_more(c);
    if (c->received < size)
        return;
    requests++;
    waiting--;
    if (reconnects) {
        close(c->fd);
        if (stopping)
            return;
        open_connection(c);
    }
    if (!stopping)
        next_message(c);
}

/* Serve the connections until the time is up, and if we are stopping, until all that was sent has come back. */
static void spin(double until)
{
    static double alive;
    struct epoll_event events[256];
    unsigned long long seen = requests;
    double time = now(CLOCK_MONOTONIC);
    alive = alive ? alive : time;
    while (stopping ? waiting : time < until) {
        int n = epoll_wait(poller, events, 256, 0);
        if (n < 0 && errno != EINTR)
            fail("epoll_wait: %s", strerror(errno));
        for (int i = 0; i < n; i++)
            turn(events[i].data.ptr);
        time = now(CLOCK_MONOTONIC);
        if (requests != seen) {
            seen = requests;
            alive = time;
        } else if (time - alive > SILENCE)
            fail("no echo for %.0f seconds", SILENCE);
    }
}

int main(int argc, char **argv)
{
    if (argc != 7)
        fail("usage: echo_load PORT echo|connect CONNECTIONS SIZE SECONDS SERVER_PID");
    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    reconnects = !strcmp(argv[2], "connect");
    int count = atoi(argv[3]), pid = atoi(argv[6]);
    size = atol(argv[4]);
    double seconds = atof(argv[5]);

    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);

    block = malloc(size + PLACES);
    input = malloc(size + 1);
    connections = calloc(count, sizeof *connections);
    poller = epoll_create1(0);
    if (!block || !input || !connections || poller < 0)
        fail("no memory, or no epoll");
    uint32_t random = 2463534242u; /* xorshift32 */
    for (size_t i = 0; i < size + PLACES; i++) {
        random ^= random << 13, random ^= random >> 17, random ^= random << 5;
        block[i] = random;
    }

    for (int i = 0; i < count; i++) {
        connections[i].place = i * 7919u % PLACES;
        open_connection(&connections[i]);
        next_message(&connections[i]);
    }
    /* Setting out is not measured: connections are accepted, and find the size of their buffers. */
    spin(now(CLOCK_MONOTONIC) + 0.05 + seconds / 10);

    clockid_t cpu = (~(clockid_t)pid << 3) | 2; /* what clock_getcpuclockid() returns */
    static char report[1 << 16];
    setvbuf(stdout, report, _IOFBF, sizeof report); /* nobody is to wake up and read while we measure */
    double end = now(CLOCK_MONOTONIC) + seconds;
    for (double start; (start = now(CLOCK_MONOTONIC)) < end - SLICE / 2;) {
        requests = 0;
        double used = now(cpu), delay = waited(pid) + waited(getpid());
        spin(start + SLICE);
        used = now(cpu) - used;
        delay = waited(pid) + waited(getpid()) - delay;
        printf("%llu %.6f %.6f %.6f\n", requests, now(CLOCK_MONOTONIC) - start, used, delay);
    }
    stopping = 1;
    spin(0);
    return 0;
}
