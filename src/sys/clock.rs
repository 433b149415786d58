//! The offset of local time from UTC, which log lines carry.

use nix::libc;

/// Seconds east of UTC at `seconds` after the epoch, by the system's time zone; 0 where that cannot be told.
pub fn utc_offset(seconds: i64) -> i32 {
    // SAFETY: an all-zero `tm` is a valid value of that plain C struct (its pointer is null).
    let mut broken_down: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live, properly aligned values; localtime_r writes only `broken_down` and, unlike localtime, shares no buffer.
    let filled = unsafe { libc::localtime_r(&seconds, &mut broken_down) };
    if filled.is_null() {
        return 0;
    }
    i32::try_from(broken_down.tm_gmtoff).unwrap_or(0)
}
