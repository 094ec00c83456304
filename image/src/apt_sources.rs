//! From the apt sources that the machine has to those of Debian 13. Pure.
//!
//! The mirror is whatever the machine's administrator chose: host names are read, never written into the
//! repository. Only entries whose suite is a Debian release (or its updates or security suite) count.

/// One place that the machine fetches a Debian suite from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Source {
    uri: String,
    suite: String,
}

/// The release that images are made of.
const RELEASE: &str = "trixie";

/// Names under which a machine may know the Debian it runs.
const RELEASES: &[&str] = &[
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
];

/// The text of a `debian.sources` for Debian 13 through the mirrors named in `files` (contents of the machine's
/// `sources.list` and `*.list` files, and of its `*.sources` files), or `None` when they name no Debian mirror.
pub fn for_release(lists: &[String], deb822: &[String], keyring: &str) -> Option<String> {
    let mut sources: Vec<Source> = lists.iter().flat_map(|text| one_line(text)).collect();
    sources.extend(deb822.iter().flat_map(|text| stanzas(text)));
    let pick = |wanted: fn(&str) -> bool| sources.iter().find(|s| wanted(&s.suite)).map(|s| s.uri.clone());
    let archive = pick(|s| RELEASES.contains(&s))?;
    let mut suites = vec![(archive, format!("{RELEASE} {RELEASE}-updates"))];
    if let Some(security) = pick(|s| security_of(s).is_some_and(|r| RELEASES.contains(&r))) {
        suites.push((security, format!("{RELEASE}-security")));
    }
    let stanza = |(uri, suites): (String, String)| {
        format!("Types: deb\nURIs: {uri}\nSuites: {suites}\nComponents: main\nSigned-By: {keyring}\n")
    };
    Some(suites.into_iter().map(stanza).collect::<Vec<_>>().join("\n"))
}

/// The release of a security suite, in either spelling.
fn security_of(suite: &str) -> Option<&str> {
    suite.strip_suffix("-security").or_else(|| suite.strip_suffix("/updates"))
}

/// `deb [options] uri suite components...`
fn one_line(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    for line in text.lines() {
        let Some(rest) = line.trim().strip_prefix("deb").filter(|r| r.starts_with([' ', '\t'])) else {
            continue;
        };
        let rest = rest.trim_start();
        let rest = match rest.strip_prefix('[') {
            Some(options) => options.split_once(']').map_or("", |(_, after)| after),
            None => rest,
        };
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next())
            && words.any(|component| component == "main")
        {
            found.push(Source { uri: uri.into(), suite: suite.into() });
        }
    }
    found
}

/// Stanzas of `Key: value` lines; a line that starts with a space continues the value.
fn stanzas(text: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let text: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    for stanza in text.split(|line| line.trim().is_empty()) {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push(' ');
                    value.push_str(line.trim());
                }
            } else if let Some((key, value)) = line.split_once(':') {
                fields.push((key.trim().to_ascii_lowercase(), value.trim().to_string()));
            }
        }
        let get = |key: &str| fields.iter().find(|(k, _)| k == key).map_or("", |(_, v)| v);
        let has = |key: &str, word: &str| get(key).split_whitespace().any(|w| w == word);
        if get("enabled").eq_ignore_ascii_case("no") || !has("types", "deb") || !has("components", "main") {
            continue;
        }
        for uri in get("uris").split_whitespace() {
            found.extend(
                get("suites").split_whitespace().map(|suite| Source { uri: uri.into(), suite: suite.into() }),
            );
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYRING: &str = "/k.gpg";

    #[test]
    fn stanzas_of_a_debian_12_machine() {
        let host = "Types: deb\n# a note\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\n\
                    Types: deb\nURIs: http://mirror.example/security\nSuites: bookworm-security\nComponents: main\n";
        let text = for_release(&[], &[host.into()], KEYRING).unwrap();
        assert!(
            text.contains("URIs: http://mirror.example/debian\nSuites: trixie trixie-updates\n"),
            "{text}"
        );
        assert!(text.contains("URIs: http://mirror.example/security\nSuites: trixie-security\n"), "{text}");
    }

    #[test]
    fn one_line_entries_with_options_and_strangers() {
        let host = "deb [signed-by=/x arch=amd64] https://other.example/apt cloud-bookworm main\n\
                    # deb http://off.example bookworm main\ndeb-src http://mirror.example/debian bookworm main\n\
                    deb [ trusted=yes ] file:/srv/debian stable main contrib\n";
        let text = for_release(&[host.into()], &[], KEYRING).unwrap();
        assert!(text.contains("URIs: file:/srv/debian\n") && !text.contains("other.example"), "{text}");
        assert!(!text.contains("-security"));
    }

    #[test]
    fn a_machine_without_debian() {
        let disabled =
            "Types: deb\nEnabled: no\nURIs: http://m.example\nSuites: bookworm\nComponents: main\n";
        assert_eq!(
            for_release(&["deb http://u.example/ubuntu noble main".into()], &[disabled.into()], KEYRING),
            None
        );
    }
}
