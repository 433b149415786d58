//! A network namespace behind a long, narrow cable: veth, tbf for the rate, nfqdelay for the delay. Real TCP, with its slow start.
//!
//! What is to be far away is started in the namespace and reached at [`Link::far`].

use super::command::{attempt, command, run, try_run};
use super::process::Process;
use super::slot::Slot;
use std::path::PathBuf;
use std::process::Command;

/// What a link does to packets, in each direction.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Shape {
    pub mbit: u32,
    pub delay_us: u32,
}

impl Shape {
    /// The shape of most measurements: a registry in the same region.
    pub const REGION: Shape = Shape { mbit: 500, delay_us: 10_000 };
    /// A registry in the same zone.
    pub const ZONE: Shape = Shape { mbit: 2000, delay_us: 1_000 };
    /// No shaping: for pushing to the far side before measuring begins.
    pub const NONE: Shape = Shape { mbit: 0, delay_us: 0 };

    pub fn bytes_per_second(self) -> f64 {
        f64::from(self.mbit) * 1e6 / 8.0
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} Mbit/s, {} ms each way", self.mbit, f64::from(self.delay_us) / 1000.0)
    }
}

pub struct Link {
    slot: u8,
    log: PathBuf,
    delays: Vec<Process>,
    iptables: &'static str,
}

impl Link {
    /// An unshaped link.
    pub fn up(slot: &Slot) -> Link {
        let n = slot.number();
        let (ns, near, far) = names(n);
        remove(n);
        run(&mut command("ip", &format!("netns add {ns}")));
        run(&mut command("ip", &format!("link add {near} type veth peer name {far} netns {ns}")));
        run(&mut command("ip", &format!("addr add 10.88.{n}.1/30 dev {near}")));
        run(&mut command("ip", &format!("link set {near} up")));
        // The kernel has one of the two iptables back ends, rarely both.
        let iptables = ["iptables-legacy", "iptables-nft", "iptables"]
            .into_iter()
            .find(|t| Command::new(t).args(["-t", "raw", "-S"]).output().is_ok_and(|o| o.status.success()))
            .expect("no iptables that can show the raw table");
        let link = Link { slot: n, log: slot.dir().join("nfqdelay.log"), delays: Vec::new(), iptables };
        run(link.inside("ip").args(["addr", "add", &format!("10.88.{n}.2/30"), "dev", &far]));
        run(link.inside("ip").args(["link", "set", &far, "up"]));
        run(link.inside("ip").args(["link", "set", "lo", "up"]));
        // The sender is there. What one run taught the kernel about the path must not help the next one.
        run(link.inside("sh").args(["-c", "echo 1 > /proc/sys/net/ipv4/tcp_no_metrics_save"]));
        link
    }

    /// The far end's address.
    pub fn far(&self) -> String {
        format!("10.88.{}.2", self.slot)
    }

    /// A command to run at the far end. (`ip netns exec` would hide the cgroups.)
    pub fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", names(self.slot).0)).arg("--").arg(program);
        command
    }

    pub fn shape(&mut self, shape: Shape) {
        let (_, near, far) = names(self.slot);
        let queue = queue(self.slot).to_string();
        let rule = |action: &str, interface: &str| -> Vec<String> {
            ["-t", "raw", action, "PREROUTING", "-i", interface, "-j", "NFQUEUE", "--queue-num", &queue]
                .map(String::from)
                .to_vec()
        };
        // Rules first: a queue that nobody reads drops everything.
        while attempt(Command::new(self.iptables).args(rule("-D", &near))).status.success() {}
        while attempt(self.inside(self.iptables).args(rule("-D", &far))).status.success() {}
        for process in self.delays.drain(..) {
            process.stop();
        }
        try_run(&mut command("tc", &format!("qdisc del dev {near} root")));
        try_run(self.inside("tc").args(["qdisc", "del", "dev", &far, "root"]));
        if shape.mbit > 0 {
            // Bucket and queue as measured to reach the nominal rate with 60 ms of buffer, like a decent router.
            let tbf =
                |dev: &str| format!("qdisc add dev {dev} root tbf rate {}mbit burst 256kb latency 60ms", shape.mbit);
            run(&mut command("tc", &tbf(&near)));
            run(self.inside("tc").args(tbf(&far).split(' ')));
        }
        if shape.delay_us > 0 {
            let helper = super::tool("nfqdelay");
            let arguments = [queue.clone(), shape.delay_us.to_string()];
            let _ = std::fs::remove_file(&self.log);
            for command in [Command::new(&helper).args(&arguments), self.inside(&helper).args(&arguments)] {
                self.delays.push(Process::start("nfqdelay", command, &self.log));
            }
            self.delays[0].wait_until("both are ready", || self.delays[0].log().matches("ready").count() == 2);
            run(Command::new(self.iptables).args(rule("-A", &near)));
            run(self.inside(self.iptables).args(rule("-A", &far)));
        }
    }

    /// The congestion control of the far end: the machine's default, and worth a line in a report.
    pub fn congestion_control(&self) -> String {
        super::command::output(self.inside("cat").arg("/proc/sys/net/ipv4/tcp_congestion_control")).trim().to_string()
    }

    /// Bytes that have come from the far end so far, headers included.
    pub fn received(&self) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/rx_bytes", names(self.slot).1);
        std::fs::read_to_string(path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.delays.clear();
        remove(self.slot);
    }
}

/// Namespace, near interface, far interface.
fn names(slot: u8) -> (String, String, String) {
    (format!("soci{slot}"), format!("soci{slot}n"), format!("soci{slot}f"))
}

pub fn queue(slot: u8) -> u16 {
    7000 + u16::from(slot)
}

/// Removes the link of a slot, if there is one. The near interface goes with its peer, the far end's rules with the namespace.
pub fn remove(slot: u8) {
    let (ns, near, _) = names(slot);
    for iptables in ["iptables-legacy", "iptables-nft"] {
        let rule = format!("-t raw -D PREROUTING -i {near} -j NFQUEUE --queue-num {}", queue(slot));
        while command(iptables, &rule).output().is_ok_and(|o| o.status.success()) {}
    }
    try_run(&mut command("ip", &format!("link del {near}")));
    try_run(&mut command("ip", &format!("netns del {ns}")));
}
