//! Values of flags as the Go tools read them: integers, booleans, durations, platforms. Pure.

use crate::oci::Platform;
use std::time::Duration;

/// Why a value was refused; Go's words where scripts may look for them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadValue {
    #[error("value out of range")]
    OutOfRange,
    #[error("invalid syntax")]
    Syntax,
    #[error("not a number of bytes, such as 536870912, 512MiB or 2GB")]
    Size,
    #[error("unsupported output format {0:?}: must be \"oci-archive\" or \"oci-dir\"")]
    Format(String),
}

/// A platform that could not be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("could not parse platform {text}: {why}")]
pub struct BadPlatform {
    text: String,
    why: String,
}

/// An int64: optional sign, then decimal digits, or `0x`, `0o`, `0b` or `0` and digits of that base; `_` between digits.
pub fn int64(text: &str) -> Result<i64, BadValue> {
    let (negative, magnitude) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    let lower = magnitude.to_ascii_lowercase();
    let (radix, digits) = match lower.as_bytes() {
        [b'0', b'x', ..] => (16, &lower[2..]),
        [b'0', b'o', ..] => (8, &lower[2..]),
        [b'0', b'b', ..] => (2, &lower[2..]),
        [b'0', _, ..] => (8, &lower[1..]),
        _ => (10, lower.as_str()),
    };
    // A `_` may follow the base prefix, and must otherwise stand between two digits.
    let digits = if radix == 10 { digits } else { digits.strip_prefix('_').unwrap_or(digits) };
    if digits.is_empty() || digits.starts_with('_') || digits.ends_with('_') || digits.contains("__") {
        return Err(BadValue::Syntax);
    }
    let digits = digits.replace('_', "");
    if !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(BadValue::Syntax);
    }
    let magnitude = i128::from_str_radix(&digits, radix).map_err(|_| BadValue::OutOfRange)?;
    i64::try_from(if negative { -magnitude } else { magnitude }).map_err(|_| BadValue::OutOfRange)
}

/// A uint64, as [`int64`].
pub fn uint64(text: &str) -> Result<u64, BadValue> {
    if text.starts_with(['-', '+']) {
        return Err(BadValue::Syntax);
    }
    // Above an int64 there is nothing that anybody counts: they are all "as many as there are".
    match int64(text) {
        Ok(value) => Ok(value.unsigned_abs()),
        Err(BadValue::OutOfRange) if text.parse::<u64>().is_ok() => Ok(u64::MAX),
        Err(error) => Err(error),
    }
}

/// A number of bytes: an integer, or one with a unit: `512MiB`, `2G`, `100kB`.
pub fn bytes(text: &str) -> Result<u64, BadValue> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits].parse().map_err(|_| BadValue::Size)?;
    let unit: u64 = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kib" => 1 << 10,
        "m" | "mi" | "mib" => 1 << 20,
        "g" | "gi" | "gib" => 1 << 30,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        _ => return Err(BadValue::Size),
    };
    number.checked_mul(unit).filter(|bytes| *bytes > 0).ok_or(BadValue::OutOfRange)
}

/// A bool, as Go's `ParseBool` reads it.
pub fn boolean(text: &str) -> Result<bool, BadValue> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(BadValue::Syntax),
    }
}

/// A Go duration: `0`, `30s`, `1h2m3.5s`, `250ms`. Negative ones are no limit, as zero is.
pub fn duration(text: &str) -> Result<Duration, BadValue> {
    let (negative, mut rest) = match text.strip_prefix(['-', '+']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(BadValue::Syntax);
    }
    let mut seconds = 0f64;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or(BadValue::Syntax)?;
        let number: f64 = rest[..digits].parse().map_err(|_| BadValue::Syntax)?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        let scale = match &rest[..unit] {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(BadValue::Syntax),
        };
        seconds += number * scale;
        rest = &rest[unit..];
    }
    if negative {
        return Ok(Duration::ZERO);
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| BadValue::OutOfRange)
}

/// A platform specifier: `os`, `arch`, `os/arch` or `os/arch/variant`, each normalised as containerd does; the OS may carry its
/// version: `windows(10.0.17763)/amd64`.
pub fn platform(text: &str) -> Result<Platform, BadPlatform> {
    let bad = |why: String| BadPlatform { text: text.to_owned(), why: format!("{why}: invalid argument") };
    let parts: Vec<&str> = text.split('/').collect();
    let mut platform = Platform::default();
    let mut names = Vec::with_capacity(3);
    for (at, part) in parts.iter().enumerate() {
        let name = match part.strip_suffix(')').and_then(|p| p.split_once('(')) {
            Some((name, version)) if at == 0 => {
                platform.os_version = version.to_owned();
                name
            }
            _ => part,
        };
        let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if name.is_empty() || !name.chars().all(valid) {
            return Err(bad(format!(
                "{part:?} is an invalid component of {text:?}: platform specifier component must match \
                 \"^[A-Za-z0-9_.-]+$\""
            )));
        }
        names.push(name);
    }
    let host = Platform::host();
    let normal = |os: &str, architecture: &str, variant: &str| {
        let p =
            Platform { os: os.into(), architecture: architecture.into(), variant: variant.into(), ..platform.clone() };
        p.normalised()
    };
    match names.as_slice() {
        [one] if is_os(one) => Ok(normal(one, &host.architecture, "")),
        [one] if is_architecture(one) => Ok(implied_variant(normal(&host.os, one, ""))),
        [one] => Err(bad(format!("{one:?}: unknown operating system or architecture"))),
        [os, architecture] => Ok(implied_variant(normal(os, architecture, ""))),
        [os, architecture, variant] => {
            let mut p = normal(os, architecture, variant);
            // containerd keeps the variant of arm64 when it is spelled out, and conversion writes it as requested.
            if p.architecture == "arm64" && p.variant.is_empty() {
                p.variant = "v8".into();
            }
            Ok(p)
        }
        _ => Err(bad(format!("{text:?}: cannot parse platform specifier"))),
    }
}

/// `arm` without a variant means v7, and is written without it.
fn implied_variant(mut p: Platform) -> Platform {
    if p.architecture == "arm" && p.variant == "v7" {
        p.variant.clear();
    }
    p
}

fn is_os(name: &str) -> bool {
    matches!(
        name.to_ascii_lowercase().as_str(),
        "aix"
            | "android"
            | "darwin"
            | "macos"
            | "dragonfly"
            | "freebsd"
            | "hurd"
            | "illumos"
            | "ios"
            | "js"
            | "linux"
            | "nacl"
            | "netbsd"
            | "openbsd"
            | "plan9"
            | "solaris"
            | "windows"
            | "zos"
    )
}

fn is_architecture(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    matches!(
        name.as_str(),
        "386"
            | "i386"
            | "amd64"
            | "x86_64"
            | "x86-64"
            | "amd64p32"
            | "arm"
            | "armhf"
            | "armel"
            | "armbe"
            | "arm64"
            | "aarch64"
            | "arm64be"
            | "loong64"
            | "mips"
            | "mipsle"
            | "mips64"
            | "mips64le"
            | "mips64p32"
            | "mips64p32le"
            | "ppc"
            | "ppc64"
            | "ppc64le"
            | "riscv"
            | "riscv64"
            | "s390"
            | "s390x"
            | "sparc"
            | "sparc64"
            | "wasm"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_as_go_reads_them() {
        for (text, value) in [("0", 0), ("-1", -1), ("+7", 7), ("0x10", 16), ("0X_1f", 31), ("0o17", 15), ("017", 15)] {
            assert_eq!(int64(text), Ok(value), "{text}");
        }
        for (text, value) in [("0b101", 5), ("4_194_304", 4194304), ("9223372036854775807", i64::MAX)] {
            assert_eq!(int64(text), Ok(value), "{text}");
        }
        assert_eq!(int64("-9223372036854775808"), Ok(i64::MIN));
        assert_eq!(int64("9223372036854775808"), Err(BadValue::OutOfRange));
        assert_eq!(int64(&"9".repeat(60)), Err(BadValue::OutOfRange));
        for text in ["", "-", "0x", "1__0", "_1", "1_", "4MiB", "08", "1.5", "--1", "0b2", "é"] {
            assert_eq!(int64(text), Err(BadValue::Syntax), "{text}");
        }
    }

    #[test]
    fn sizes_may_have_a_unit() {
        for (text, value) in [("1", 1), ("512MiB", 512 << 20), ("2g", 2 << 30), ("3 kB", 3000), ("1Gi", 1 << 30)] {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for text in ["", "0", "MiB", "-1", "1TB", "1.5G", "99999999999999999999", "99999999999g"] {
            assert!(bytes(text).is_err(), "{text}");
        }
        assert_eq!(uint64("18446744073709551615"), Ok(u64::MAX));
        assert!(uint64("-1").is_err() && uint64("18446744073709551616").is_err());
    }

    #[test]
    fn durations_are_read_as_go_reads_them() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1m"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("1h2m3.5s"), Ok(Duration::from_millis(3_723_500)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert_eq!(duration("-5s"), Ok(Duration::ZERO));
        for text in ["", "5", "s", "5x", "1m5", "1e400h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn platforms_keep_the_spelling_that_conversion_writes() {
        let p = |text: &str| platform(text).map(|p| p.to_string());
        assert_eq!(p("linux/amd64"), Ok("linux/amd64".into()));
        assert_eq!(p("linux/x86_64"), Ok("linux/amd64".into()));
        assert_eq!(p("linux/arm64"), Ok("linux/arm64".into()));
        assert_eq!(p("linux/arm64/v8"), Ok("linux/arm64/v8".into()));
        assert_eq!(p("linux/arm"), Ok("linux/arm".into()));
        assert_eq!(p("linux/arm/v7"), Ok("linux/arm/v7".into()));
        assert_eq!(p("arm64").map(|p| p.ends_with("/arm64")), Ok(true));
        assert_eq!(platform("windows(10.0.1)/amd64").map(|p| p.os_version), Ok("10.0.1".into()));
        assert_eq!(
            platform("bogus/").unwrap_err().to_string(),
            "could not parse platform bogus/: \"\" is an invalid component of \"bogus/\": platform specifier component \
             must match \"^[A-Za-z0-9_.-]+$\": invalid argument"
        );
        for text in ["", "bogus", "linux/amd64/v1/x", "linux/a d", "linux//"] {
            assert!(platform(text).is_err(), "{text}");
        }
    }
}
