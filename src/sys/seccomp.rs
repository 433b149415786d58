//! Seccomp filters, one per role.
//!
//! The holder and the custodian do so little that everything they do can be listed; all else is refused. The daemon is a tokio program that also runs
//! credential helpers, so it gets the opposite: a list of what nothing in it has any business doing. What is refused fails with EPERM rather than
//! by signal, because a holder that dies takes every container's files along.
//!
//! Before the list every filter has two rules that a list of numbers cannot express: `clone3` does not exist (its flags are in memory, where a
//! filter cannot look; libc then uses `clone`), and neither does the x32 numbering, a second name for every call on x86-64. Calls of another
//! architecture kill the process.
#![forbid(unsafe_code)]

use super::{Confinement, process::SingleThread};
use nix::libc;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use std::{collections::BTreeMap, io};

/// Who is going to be confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `soci-mount`, once it has mounted: accepts, receives, sends.
    Holder,
    /// `soci-custodian`: the same, and walking, removing and chowning below a directory it holds.
    Custodian,
    /// The custodian's process that forks workers: what a worker needs, and what it takes to fork and confine one.
    Spawner,
    /// Unpacks one layer.
    Worker,
    /// Copies one layer: a worker that also lists and reads.
    Copier,
    /// `soci-snapshotter-grpc`.
    Daemon,
}

/// Confines the calling thread and every thread it starts. Irreversible. Sets `no_new_privs`.
pub fn confine(role: Role, _: &SingleThread) -> io::Result<Confinement> {
    let program = compile(role)?;
    match seccompiler::apply_filter(&program) {
        Ok(()) => Ok(Confinement::Applied),
        // EINVAL or ENOSYS: a kernel without seccomp filters (CONFIG_SECCOMP_FILTER).
        Err(seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error))
            if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) =>
        {
            Ok(Confinement::Unsupported)
        }
        Err(error) => Err(io::Error::other(error)),
    }
}

fn compile(role: Role) -> io::Result<BpfProgram> {
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let (rules, unlisted, listed) = match role {
        Role::Holder => (calls(HOLDER), refuse, SeccompAction::Allow),
        Role::Custodian => (custodian_rules()?, refuse, SeccompAction::Allow),
        Role::Spawner => (spawner_rules()?, refuse, SeccompAction::Allow),
        Role::Worker => (worker_rules()?, refuse, SeccompAction::Allow),
        Role::Copier => (copier_rules()?, refuse, SeccompAction::Allow),
        Role::Daemon => (daemon_rules()?, SeccompAction::Allow, refuse),
    };
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, unlisted, listed, arch).map_err(io::Error::other)?;
    let listed: BpfProgram = filter.try_into().map_err(io::Error::other)?;
    Ok(prologue().into_iter().chain(listed).collect())
}

/// `clone3` → ENOSYS; on x86-64, numbers with the x32 bit → EPERM. Classic BPF, see linux/filter.h and Documentation/userspace-api/seccomp_filter.rst.
fn prologue() -> Vec<sock_filter> {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS; offset 0 of seccomp_data is the call's number
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let returns = |errno: i32| sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | errno as u32 };
    let mut program = vec![
        sock_filter { code: LOAD_WORD, jt: 0, jf: 0, k: 0 },
        sock_filter { code: JUMP_EQUAL, jt: 0, jf: 1, k: libc::SYS_clone3 as u32 },
        returns(libc::ENOSYS),
    ];
    if cfg!(target_arch = "x86_64") {
        const JUMP_GREATER_OR_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
        const X32_BIT: u32 = 0x4000_0000; // __X32_SYSCALL_BIT
        program.push(sock_filter { code: JUMP_GREATER_OR_EQUAL, jt: 0, jf: 1, k: X32_BIT });
        program.push(returns(libc::EPERM));
    }
    program
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn calls(list: &[i64]) -> Rules {
    list.iter().map(|number| (*number, Vec::new())).collect()
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> io::Result<SeccompCondition> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).map_err(io::Error::other)
}

fn rule(conditions: Vec<SeccompCondition>) -> io::Result<SeccompRule> {
    SeccompRule::new(conditions).map_err(io::Error::other)
}

fn custodian_rules() -> io::Result<Rules> {
    let mut rules = calls(HOLDER);
    rules.extend(calls(CUSTODIAN));
    // Threads, but no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![rule(vec![condition(0, SeccompCmpOp::MaskedEq(thread), thread)?])?]);
    // Only between this process and its workers.
    let unix = libc::AF_UNIX as u64;
    rules.insert(libc::SYS_socketpair, vec![rule(vec![condition(0, SeccompCmpOp::Eq, unix)?])?]);
    // Rust names its threads; nothing else of prctl is needed.
    let set_name = libc::PR_SET_NAME as u64;
    rules.insert(libc::SYS_prctl, vec![rule(vec![condition(0, SeccompCmpOp::Eq, set_name)?])?]);
    Ok(rules)
}

/// Opens only what is new or a directory. A worker may make device nodes; here is why it cannot write to a disk through one. (openat2 has its flags in
/// memory and is not for it.)
fn worker_rules() -> io::Result<Rules> {
    let mut rules = calls(WORKER);
    let with_all_of = |flags: i32| rule(vec![condition(2, SeccompCmpOp::MaskedEq(flags as u64), flags as u64)?]);
    let opens = vec![with_all_of(libc::O_CREAT | libc::O_EXCL)?, with_all_of(libc::O_DIRECTORY)?];
    rules.insert(libc::SYS_openat, opens);
    Ok(rules)
}

/// A worker's, and opening to read: still nothing that exists can be opened to be written to.
fn copier_rules() -> io::Result<Rules> {
    let mut rules = worker_rules()?;
    rules.extend(copying()?);
    let reads = condition(2, SeccompCmpOp::MaskedEq(libc::O_ACCMODE as u64), libc::O_RDONLY as u64)?;
    rules.entry(libc::SYS_openat).or_default().push(rule(vec![reads])?);
    Ok(rules)
}

/// What copying takes besides.
fn copying() -> io::Result<Rules> {
    let mut rules = calls(COPIER);
    const FICLONE: u64 = 0x4004_9409; // _IOW(0x94, 9, int) of linux/fs.h; in the crate libc its type depends on the libc
    let share = condition(1, SeccompCmpOp::Eq, FICLONE)?;
    rules.insert(libc::SYS_ioctl, vec![rule(vec![share])?]);
    Ok(rules)
}

fn spawner_rules() -> io::Result<Rules> {
    let mut rules = calls(HOLDER);
    rules.extend(calls(WORKER));
    rules.extend(copying()?);
    rules.extend(calls(SPAWNER));
    rules.extend(calls(&[libc::SYS_openat]));
    // Processes as fork(3) makes them: no threads, no shared memory, no namespaces.
    let never = libc::CLONE_THREAD
        | libc::CLONE_VM
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    rules.insert(libc::SYS_clone, vec![rule(vec![condition(0, SeccompCmpOp::MaskedEq(never as u64), 0)?])?]);
    Ok(rules)
}

fn daemon_rules() -> io::Result<Rules> {
    let mut rules = calls(DAEMON_NEVER);
    // A new user namespace would hand out a full set of capabilities inside it, and with them most of the kernel's attack surface.
    let namespaces = [
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWNS,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWCGROUP,
    ];
    let one_set = |flag: i32| rule(vec![condition(0, SeccompCmpOp::MaskedEq(flag as u64), flag as u64)?]);
    rules.insert(libc::SYS_clone, namespaces.into_iter().map(one_set).collect::<io::Result<_>>()?);
    // Unix, IPv4, IPv6, and netlink for the resolver's list of addresses; not packet, vsock, alg and the like.
    let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    let none_of = families.into_iter().map(|f| condition(0, SeccompCmpOp::Ne, f as u64)).collect::<io::Result<_>>()?;
    rules.insert(libc::SYS_socket, vec![rule(none_of)?]);
    Ok(rules)
}

/// Messages, memory, and the end: what any Rust program that serves a socket does.
const HOLDER: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_fcntl,
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_ppoll,
    libc::SYS_geteuid,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // musl's raise and abort.
    #[cfg(target_env = "musl")]
    libc::SYS_tkill,
];

/// Threads and trees, on top of [`HOLDER`]. Every call that takes a path takes a directory descriptor with it.
const CUSTODIAN: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_newfstatat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_fchown,
    libc::SYS_fchmod,
    libc::SYS_utimensat,
    libc::SYS_flistxattr,
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_getegid,
    libc::SYS_dup,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_statx,
    libc::SYS_syncfs,
];

/// Making a tree out of what a pipe says. Nothing here opens a socket, starts a process, or undoes a confinement.
const WORKER: &[i64] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_splice,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fsetxattr,
    libc::SYS_lsetxattr,
    libc::SYS_utimensat,
    libc::SYS_fchdir,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_sendmsg,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Walking and reading the tree that is copied.
const COPIER: &[i64] = &[
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_readlinkat,
    libc::SYS_flistxattr,
    libc::SYS_fgetxattr,
    libc::SYS_llistxattr,
    libc::SYS_lgetxattr,
    libc::SYS_copy_file_range,
];

/// Receiving orders, and confining the process that was just forked.
const SPAWNER: &[i64] = &[
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    libc::SYS_prlimit64,
    libc::SYS_chroot,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_getppid,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    // musl's fork, where the architecture has the call; it takes no flags.
    #[cfg(all(target_env = "musl", target_arch = "x86_64"))]
    libc::SYS_fork,
];

/// Privileged, tracing and kernel-configuring calls. Without capabilities most of them fail anyway; here their code is not even reached.
const DAEMON_NEVER: &[i64] = &[
    // mounts and namespaces
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_unshare,
    libc::SYS_setns,
    // other processes' memory
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    // the kernel itself
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_personality,
    libc::SYS_fanotify_init,
    // keys
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // identity and the machine's name and time
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    // files by handle: reaches around every directory permission
    libc::SYS_open_by_handle_at,
    // ports and segments
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ustat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_sysfs,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_fits_the_kernels_limit_and_starts_by_hiding_clone3() {
        for role in [Role::Holder, Role::Custodian, Role::Spawner, Role::Worker, Role::Copier, Role::Daemon] {
            let program = compile(role).expect("compiles");
            assert!(program.len() < 4096, "{role:?}: BPF_MAXINSNS"); // linux/bpf_common.h
            assert_eq!(program[1].k, libc::SYS_clone3 as u32);
        }
    }
}
