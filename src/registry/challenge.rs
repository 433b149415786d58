//! `WWW-Authenticate`, read (RFC 9110 11.6.1). Pure.

/// One way in which a registry accepts proof of who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: String, scope: String },
}

/// Longest header read. A realm and a scope take a few hundred bytes.
const MAX_HEADER: usize = 8192;

/// The challenges of one header value that we understand, Bearer first.
pub(super) fn parse(value: &str) -> Vec<Challenge> {
    if value.len() > MAX_HEADER {
        return Vec::new();
    }
    let mut out = Vec::new();
    let mut scheme: Option<String> = None;
    let mut params: Vec<(String, String)> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            break;
        }
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            return Vec::new();
        }
        let after_blank = after.trim_start_matches([' ', '\t']);
        match after_blank.strip_prefix('=') {
            Some(text) if scheme.is_some() => {
                let Some((text, tail)) = text_of(text.trim_start_matches([' ', '\t'])) else { return Vec::new() };
                params.push((word.to_ascii_lowercase(), text));
                rest = tail;
            }
            Some(_) => return Vec::new(),
            None => {
                finish(scheme.replace(word.to_ascii_lowercase()), std::mem::take(&mut params), &mut out);
                rest = after;
            }
        }
    }
    finish(scheme, params, &mut out);
    out.sort_by_key(|challenge| matches!(challenge, Challenge::Basic));
    out
}

fn finish(scheme: Option<String>, params: Vec<(String, String)>, out: &mut Vec<Challenge>) {
    let param = |name: &str| params.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    match scheme.as_deref() {
        Some("basic") => out.push(Challenge::Basic),
        Some("bearer") => {
            if let Some(realm) = param("realm") {
                let or_empty = |name| param(name).unwrap_or_default();
                out.push(Challenge::Bearer { realm, service: or_empty("service"), scope: or_empty("scope") });
            }
        }
        _ => {}
    }
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/:".contains(c)
}

/// A token or a quoted string at the start of `text`, and what follows it.
fn text_of(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        return Some((word.to_owned(), rest));
    };
    let mut out = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((out, &quoted[at + 1..])),
            '\\' => out.push(chars.next()?.1),
            c => out.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: &str, scope: &str) -> Challenge {
        Challenge::Bearer { realm: realm.into(), service: service.into(), scope: scope.into() }
    }

    #[test]
    fn registries_write_their_challenges_in_many_ways() {
        assert_eq!(
            parse(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#
            ),
            [bearer("https://auth.docker.io/token", "registry.docker.io", "repository:a/b:pull,push")]
        );
        assert_eq!(parse(r#"basic realm="r, \"x\"", charset=UTF-8"#), [Challenge::Basic]);
        assert_eq!(parse("Basic"), [Challenge::Basic]);
        assert_eq!(
            parse(r#"Basic realm="a", BEARER realm="https://t" , service=s"#),
            [bearer("https://t", "s", ""), Challenge::Basic]
        );
    }

    #[test]
    fn nonsense_is_no_challenge() {
        for text in
            ["", "Negotiate", r#"Bearer realm="unterminated"#, "Bearer", "=x", r#"Bearer realm="a\"#, "\"", "🦀"]
        {
            assert_eq!(parse(text), [], "{text}");
        }
        assert_eq!(parse(&"a".repeat(100_000)), []);
    }
}
