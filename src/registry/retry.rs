//! When to ask again: pure arithmetic over a clock and a random number given by the caller.

use std::time::Duration;

/// How often and how long to wait for a registry that has trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetrySettings {
    /// Attempts after the first.
    pub max_retries: u32,
    /// Wait before the second attempt; each later wait is twice the one before.
    pub min_wait: Duration,
    /// No wait is longer, whatever the registry asks for.
    pub max_wait: Duration,
}

impl Default for RetrySettings {
    /// The defaults of `[http]` and `[blob]`.
    fn default() -> RetrySettings {
        RetrySettings { max_retries: 8, min_wait: Duration::from_millis(30), max_wait: Duration::from_millis(300_000) }
    }
}

impl RetrySettings {
    /// The wait after `attempt` failed (the first is 1), given what the registry asked for. `random` spreads the callers:
    /// up to an eighth of the wait is added.
    pub(super) fn wait(&self, attempt: u32, asked: Option<Duration>, random: u64) -> Duration {
        let doubled = 1u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        let wait = asked.unwrap_or_else(|| self.min_wait.saturating_mul(doubled)).min(self.max_wait);
        let spread = u64::try_from(wait.as_nanos() / 8).unwrap_or(u64::MAX).max(1);
        wait + Duration::from_nanos(random % spread)
    }
}

/// What a `Retry-After` header asks for: seconds, or a date. A date in the past asks for nothing.
pub(super) fn retry_after(value: &str, now: jiff::Timestamp) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
    Some(Duration::try_from(at.duration_since(now)).unwrap_or_default())
}

/// A number nobody can predict well enough to matter; spreads retries, protects nothing.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn waits_double_up_to_the_cap_and_are_spread_by_an_eighth() {
        let settings = RetrySettings { max_retries: 8, min_wait: 30 * MS, max_wait: 100 * MS };
        assert_eq!(settings.wait(1, None, 0), 30 * MS);
        assert_eq!(settings.wait(2, None, 0), 60 * MS);
        assert_eq!(settings.wait(9, None, 0), 100 * MS);
        assert_eq!(settings.wait(u32::MAX, None, 0), 100 * MS);
        for random in [0, 1, 12_499_999, u64::MAX] {
            let wait = settings.wait(9, None, random);
            assert!((100 * MS..100 * MS + 12_500 * Duration::from_micros(1)).contains(&wait), "{wait:?}");
        }
    }

    #[test]
    fn retry_after_may_be_zero_or_past_and_never_exceeds_the_cap() {
        let settings = RetrySettings { max_retries: 8, min_wait: 30 * MS, max_wait: 100 * MS };
        let now: jiff::Timestamp = "1994-11-06T08:49:37Z".parse().unwrap();
        assert_eq!(retry_after("0", now), Some(Duration::ZERO));
        assert_eq!(retry_after(" 7 ", now), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:40 GMT", now), Some(Duration::from_secs(3)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:49:30 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", now), None);
        assert_eq!(settings.wait(1, Some(Duration::ZERO), u64::MAX), Duration::ZERO);
        assert_eq!(settings.wait(1, Some(Duration::from_secs(9)), 0), 100 * MS);
    }
}
