//! Whether a thread that waits for us is about to end: what `/proc` shows of its signals.

/// Whether a thread will end as soon as it stops waiting. A thread that cannot be seen counts as dying, because else nothing
/// might ever end its read.
pub(super) fn is_dying(thread: u32) -> bool {
    if thread == 0 {
        return true;
    }
    std::fs::read_to_string(format!("/proc/{thread}/status")).map_or(true, |status| has_deadly_signal(&status))
}

/// Whether a signal is pending whose outcome is the end of the process. For most that is SIGKILL, which the kernel itself
/// sends to all threads when a process is killed; but a SIGTERM that comes while another signal waits stays a SIGTERM.
fn has_deadly_signal(status: &str) -> bool {
    /// Signals (bit n - 1 for signal n) that by default do nothing, stop or continue: CHLD CONT STOP TSTP TTIN TTOU URG WINCH.
    const HARMLESS: u64 = 1 << 16 | 1 << 17 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 27;
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
    };
    let sets = [set("SigPnd:"), set("ShdPnd:"), set("SigBlk:"), set("SigIgn:"), set("SigCgt:")];
    let [Some(thread), Some(process), Some(blocked), Some(ignored), Some(caught)] = sets else { return true };
    (thread | process) & !blocked & !ignored & !caught & !HARMLESS != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pending: u64, shared: u64, blocked: u64, ignored: u64, caught: u64) -> String {
        format!(
            "Name:\tx\nSigQ:\t0/1\nSigPnd:\t{pending:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n\
             SigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"
        )
    }

    #[test]
    fn only_a_signal_that_ends_the_process_makes_it_dying() {
        let bit = |signal: u32| 1u64 << (signal - 1);
        let (usr1, kill, term, child) = (bit(10), bit(9), bit(15), bit(17));
        assert!(!has_deadly_signal(&status(0, 0, 0, 0, 0)));
        assert!(has_deadly_signal(&status(kill, 0, !kill, 0, !kill)));
        assert!(has_deadly_signal(&status(0, term | usr1, 0, 0, usr1)));
        assert!(!has_deadly_signal(&status(0, usr1 | child, 0, 0, usr1)));
        assert!(!has_deadly_signal(&status(term, 0, term, 0, 0)));
        assert!(!has_deadly_signal(&status(term, 0, 0, term, 0)));
        assert!(has_deadly_signal("Name:\tx\n"));
        assert!(!is_dying(std::process::id()));
        assert!(is_dying(0) && is_dying(u32::MAX));
    }
}
