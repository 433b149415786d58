//! The packages in booted systems: what people do with them on Amazon Linux, from `dnf install` to `dnf remove`.
//!
//! ```text
//!   vm-tests [BACKEND…]        make vm-test      on this machine: builds packages and an image, boots a guest per backend, reads what it found
//!   vm-tests storm             make storm        the daemon is killed a thousand times under containers that read ([`host::storm`])
//!   vm-tests power-cuts        make storm        an emulated machine loses power in the middle of its work ([`host::cuts`])
//!   vm-tests guest             in the guest      started by its unit vm-test.service: lives through the story, step by step
//!   vm-tests probe ROLE        in the guest      in the place of one of the product's programs: tries what its unit must refuse
//! ```
//!
//! Backends: `nspawn` (Debian 12, systemd 252 as in Amazon Linux 2023), `nspawn-old` (Debian 11, systemd 247: the oldest to be had, with
//! the package and the units of Amazon Linux 2), `qemu` (Debian 12 with its kernel 6.1, cgroup v2), and `official=PATH:SHA256` for images
//! that Amazon publishes. A backend that cannot run here is skipped and says why; nothing that was skipped counts as passed.
//!
//! The story ([`guest::story`]) is one life of a machine. Steps build on each other, so the first that fails ends it.
#![forbid(unsafe_code)]

mod guest;
mod host;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["guest"] => guest::main(),
        ["probe", role] => guest::probe::main(role),
        ["storm", ref more @ ..] => host::storm::main(more),
        ["power-cuts", ref more @ ..] => host::cuts::main(more),
        _ => host::main(&words),
    }
}

/// What a step or a preparation found wrong.
pub type Outcome<T = ()> = Result<T, String>;

/// Fails with a message unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}
