/*
 * nfqdelay QUEUE MICROSECONDS: lets every packet of a netfilter queue pass MICROSECONDS after it arrived.
 *
 * A stand-in for netem on kernels without it. Packets keep their order and are never copied here (only their ids come to user space),
 * so TCP behaves as it does over a long cable: slow start, windows, acknowledgements, all real. Queue from PREROUTING of the receiving
 * end; queueing from OUTPUT ruins the throughput.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <libnetfilter_queue/libnetfilter_queue.h>
#include <linux/netfilter.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

/* More packets than a 2 Gbit/s link holds in 100 ms, even unmerged; also what the kernel may queue for us. A power of two. */
#define WAITING 65536

struct packet {
    uint32_t id;
    uint64_t due;
};

static struct packet waiting[WAITING];
static uint32_t first, next; /* free-running; first == next: nothing waits */
static uint64_t delay_ns;

static uint64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int arrived(struct nfq_q_handle *queue, struct nfgenmsg *message, struct nfq_data *data, void *unused)
{
    (void)message, (void)unused;
    struct nfqnl_msg_packet_hdr *header = nfq_get_msg_packet_hdr(data);
    if (!header)
        return 0;
    uint32_t id = ntohl(header->packet_id);
    if (next - first == WAITING) /* cannot happen while the kernel keeps to its own limit */
        return nfq_set_verdict(queue, id, NF_DROP, 0, NULL);
    waiting[next++ % WAITING] = (struct packet){id, clock_ns() + delay_ns};
    return 0;
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: nfqdelay QUEUE MICROSECONDS\n");
        return 2;
    }
    delay_ns = strtoull(argv[2], NULL, 10) * 1000u;

    struct nfq_handle *netlink = nfq_open();
    if (!netlink)
        fail("nfq_open");
    struct nfq_q_handle *queue = nfq_create_queue(netlink, (uint16_t)atoi(argv[1]), arrived, NULL);
    if (!queue)
        fail("nfq_create_queue");
    if (nfq_set_mode(queue, NFQNL_COPY_META, 0) < 0)
        fail("nfq_set_mode");
    nfq_set_queue_maxlen(queue, WAITING - 1);
    nfq_set_queue_flags(queue, NFQA_CFG_F_GSO, NFQA_CFG_F_GSO); /* big merged packets stay merged */

    int fd = nfq_fd(netlink);
    int room = 8 << 20;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    puts("ready");
    fflush(stdout);

    for (;;) {
        struct timespec until_due = {0, 0}, *timeout = NULL;
        if (first != next) {
            uint64_t now = clock_ns(), due = waiting[first % WAITING].due;
            if (due > now) {
                until_due.tv_sec = (time_t)((due - now) / 1000000000u);
                until_due.tv_nsec = (long)((due - now) % 1000000000u);
            }
            timeout = &until_due;
        }
        struct pollfd pollfd = {fd, POLLIN, 0};
        if (ppoll(&pollfd, 1, timeout, NULL) > 0) {
            char buffer[8192] __attribute__((aligned(8)));
            ssize_t length;
            while ((length = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT)) > 0)
                nfq_handle_packet(netlink, buffer, (int)length);
        }
        uint64_t now = clock_ns();
        while (first != next && waiting[first % WAITING].due <= now)
            nfq_set_verdict(queue, waiting[first++ % WAITING].id, NF_ACCEPT, 0, NULL);
    }
}
