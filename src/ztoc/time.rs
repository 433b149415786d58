//! RFC 3339 as zTOCs use it, and the calendar arithmetic for it.

/// Seconds of the year 1, where Go's zero time is: what readers make of a time that does not parse.
const YEAR_ONE: (i64, u32) = (-62_135_596_800, 0);

const DAY: i64 = 86_400;

/// UTC with nanoseconds, trailing zeros cut off. Empty outside the years 0 to 9999, as Go has it.
pub fn format((seconds, nanos): (i64, u32)) -> String {
    let (days, of_day) = (seconds.div_euclid(DAY), seconds.rem_euclid(DAY));
    let (year, month, day) = civil(days);
    if !(0..=9999).contains(&year) {
        return String::new();
    }
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if nanos > 0 {
        let fraction = format!(".{nanos:09}");
        text.push_str(fraction.trim_end_matches('0'));
    }
    text.push('Z');
    text
}

/// Nothing longer is a time; Go writes at most 35 bytes. Keeps a long string that many entries share from costing much.
const MAX_TEXT: usize = 64;

/// Any numeric zone is understood; text that is no time is the year 1.
pub fn parse(text: &[u8]) -> (i64, u32) {
    if text.len() > MAX_TEXT { YEAR_ONE } else { try_parse(text).unwrap_or(YEAR_ONE) }
}

fn try_parse(text: &[u8]) -> Option<(i64, u32)> {
    let number = |from: usize, to: usize| {
        text.get(from..to)?
            .iter()
            .try_fold(0i64, |value, digit| digit.is_ascii_digit().then(|| value * 10 + i64::from(digit - b'0')))
    };
    let is = |at: usize, c: u8| (text.get(at) == Some(&c)).then_some(());
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    is(4, b'-')?;
    is(7, b'-')?;
    is(10, b'T')?;
    is(13, b':')?;
    is(16, b':')?;
    let days = days(year, month, day);
    if hour > 23 || minute > 59 || second > 59 || civil(days) != (year, month, day) {
        return None;
    }
    let mut at = 19;
    let mut nanos = 0;
    if is(at, b'.').is_some() {
        let digits = text[at + 1..].iter().take_while(|c| c.is_ascii_digit()).count();
        if digits == 0 {
            return None;
        }
        let fraction = text[at + 1..at + 1 + digits].iter().copied().chain(std::iter::repeat(b'0')).take(9);
        nanos = fraction.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
        at += 1 + digits;
    }
    let zone = match text.get(at)? {
        b'Z' if text.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if text.len() == at + 6 => {
            is(at + 3, b':')?;
            let (hours, minutes) = (number(at + 1, at + 3)?, number(at + 4, at + 6)?);
            if hours > 24 || minutes > 59 {
                return None;
            }
            let offset = hours * 3600 + minutes * 60;
            if *sign == b'-' { -offset } else { offset }
        }
        _ => return None,
    };
    Some((days * DAY + hour * 3600 + minute * 60 + second - zone, nanos))
}

/// Year, month and day of a number of days since 1970, in the proleptic Gregorian calendar. Counts years from March, so
/// that the leap day is the last of the year, and in eras of 400 years, which all have 146,097 days.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (year_of_era + era * 400 + carry, month, day)
}

/// The inverse of [`civil`].
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_utc_without_trailing_zeros() {
        assert_eq!(format((1_700_000_000, 0)), "2023-11-14T22:13:20Z");
        assert_eq!(format((1_700_000_000, 250_000_000)), "2023-11-14T22:13:20.25Z");
        assert_eq!(format((-2, 500_000_000)), "1969-12-31T23:59:58.5Z");
        assert_eq!(format((0, 1)), "1970-01-01T00:00:00.000000001Z");
        assert_eq!(format(YEAR_ONE), "0001-01-01T00:00:00Z");
        assert_eq!(format((253_402_300_799, 0)), "9999-12-31T23:59:59Z");
        for outside in [253_402_300_800, -62_167_219_201, i64::MAX, i64::MIN] {
            assert_eq!(format((outside, 0)), "", "{outside}");
        }
    }

    #[test]
    fn any_zone_is_the_same_instant_and_nonsense_is_the_year_one() {
        for text in ["2023-11-14T22:13:20.25Z", "2023-11-15T07:13:20.25+09:00", "2023-11-14T16:43:20.250-05:30"] {
            assert_eq!(parse(text.as_bytes()), (1_700_000_000, 250_000_000), "{text}");
        }
        for text in [
            "",
            "x",
            "2023-02-29T00:00:00Z",
            "2023-01-01T24:00:00Z",
            "2023-01-01T00:00:00",
            "2023-01-01T00:00:00.Z",
            "2023-01-01T00:00:00+0900",
            "2023-01-01T00:00:00Zx",
            "2023-00-01T00:00:00Z",
            "2023-01-01 00:00:00Z",
        ] {
            assert_eq!(parse(text.as_bytes()), YEAR_ONE, "{text}");
        }
    }

    #[test]
    fn format_and_parse_agree_on_every_day_of_ten_thousand_years() {
        for day in (days(0, 1, 1)..=days(9999, 12, 31)).step_by(7) {
            let instant = (day * DAY + 86_399, 999_999_999);
            assert_eq!(parse(format(instant).as_bytes()), instant);
        }
    }
}
