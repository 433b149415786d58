//! Notations of other people's configuration files.
#![forbid(unsafe_code)]

use std::time::Duration;

/// A duration as Go writes it: `1h30m`, `1.5s`, `300ms`, `0`. None if it is something else, negative, or longer than 290 years.
pub fn go_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total: u128 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let nanos: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let whole: u128 = if whole.is_empty() { 0 } else { whole.get(..19.min(whole.len()))?.parse().ok()? };
        // More digits than nanoseconds have do not count.
        let digits = fraction.get(..18.min(fraction.len()))?;
        let part = match digits {
            "" => 0,
            digits => digits.parse::<u128>().ok()?.checked_mul(nanos)? / 10u128.pow(u32::try_from(digits.len()).ok()?),
        };
        total = total.checked_add(whole.checked_mul(nanos)?)?.checked_add(part)?;
        rest = tail;
    }
    let total = u64::try_from(total).ok().filter(|n| i64::try_from(*n).is_ok())?;
    Some(Duration::from_nanos(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_those_of_go() {
        for (text, millis) in [
            ("3s", 3000),
            ("1h30m", 5_400_000),
            ("12h0m0s", 43_200_000),
            ("1.5s", 1500),
            (".5s", 500),
            ("1.s", 1000),
            ("300ms", 300),
            ("0", 0),
            ("0s", 0),
            ("+2s", 2000),
        ] {
            assert_eq!(go_duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "3", "-3s", "s", ".s", "3 s", "3x", "99999999999999999999h", "1..2s", "+", "3s4", "9999999h"] {
            assert_eq!(go_duration(text), None, "{text}");
        }
    }
}
