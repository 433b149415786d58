//! Columns as Go's tabwriter makes them for the Go CLI: at least eight wide, four blanks between them, and after the last. Pure.

/// Blanks after the widest cell of a column.
const PADDING: usize = 4;
/// Narrowest column.
const NARROWEST: usize = 8;

/// A table; the first row is its head.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let length = |cell: &String| cell.chars().count();
    let widths: Vec<usize> = (0..columns)
        .map(|at| rows.iter().filter_map(|row| row.get(at)).map(length).max().unwrap_or(0))
        .map(|widest| (widest + PADDING).max(NARROWEST))
        .collect();
    let mut out = String::new();
    for row in rows {
        for (cell, width) in row.iter().zip(&widths) {
            out.push_str(cell);
            out.extend(std::iter::repeat_n(' ', width - length(cell)));
        }
        out.push('\n');
    }
    out
}

/// A head.
pub fn head<const N: usize>(names: [&str; N]) -> Vec<String> {
    names.map(str::to_owned).to_vec()
}

/// How long ago something was, as Go prints a duration of whole seconds: `0s`, `1m0s`, `1h2m3s`.
pub fn ago(at: Option<jiff::Timestamp>, now: jiff::Timestamp) -> String {
    let Some(at) = at else { return "n/a".to_owned() };
    let seconds = (now.as_millisecond() - at.as_millisecond()).max(0) as u64; // milliseconds, not yet rounded
    let seconds = (seconds + 500) / 1000;
    let (h, m, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (h, m) {
        (0, 0) => format!("{s}s ago"),
        (0, _) => format!("{m}m{s}s ago"),
        _ => format!("{h}h{m}m{s}s ago"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_of_the_go_cli() {
        let head = head(["DIGEST", "SIZE", "IMAGE REF"]);
        assert_eq!(table(std::slice::from_ref(&head)), "DIGEST    SIZE    IMAGE REF    \n");
        let row = vec!["sha256:0123".to_owned(), "123456".to_owned(), String::new()];
        assert_eq!(
            table(&[head, row]),
            "DIGEST         SIZE      IMAGE REF    \nsha256:0123    123456                 \n"
        );
    }

    #[test]
    fn times_are_told_as_go_does() {
        let now: jiff::Timestamp = "2024-01-02T03:04:05.4Z".parse().unwrap();
        let told = |text: &str| ago(Some(text.parse().unwrap()), now);
        assert_eq!(told("2024-01-02T03:04:05.2Z"), "0s ago");
        assert_eq!(told("2024-01-02T03:04:06Z"), "0s ago");
        assert_eq!(told("2024-01-02T03:03:05Z"), "1m0s ago");
        assert_eq!(told("2024-01-01T03:04:05Z"), "24h0m0s ago");
        assert_eq!(told("2024-01-02T02:02:02.4Z"), "1h2m3s ago");
        assert_eq!(ago(None, now), "n/a");
    }
}
