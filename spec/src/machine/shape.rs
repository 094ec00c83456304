//! Checks a YAML tree against the JSON schema of the wire types, and explains fields from it.
//!
//! The schema is made from the types in `machine.rs`, so a new field is checked, suggested and explained the moment
//! it exists. serde alone would stop at the first error.

use super::MachineFile;
use super::problem::{Findings, did_you_mean};
use serde_json::{Map, Value};

/// The JSON schema of the machine config.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(MachineFile).to_value();
    if let Some(root) = schema.as_object_mut() {
        root.insert("title".into(), "Atoll machine config v1".into());
        if let Some(properties) = root.get_mut("properties") {
            properties["apiVersion"]["const"] = super::API_VERSION.into();
            properties["kind"]["const"] = super::KIND.into();
        }
    }
    schema
}

/// Adds a finding for every unknown, missing or ill-typed field, and takes empty fields out of the tree.
pub(super) fn check(tree: &mut Value, found: &mut Findings) {
    let root = schema();
    Checker { root: &root }.value(tree, &root, "", found);
}

struct Checker<'a> {
    root: &'a Value,
}

impl<'a> Checker<'a> {
    /// Follows references, and takes the one branch that is not `null` of an optional field.
    fn resolve(&self, schema: &'a Value) -> &'a Value {
        let mut schema = schema;
        for _ in 0..8 {
            if let Some(pointer) = schema.get("$ref").and_then(Value::as_str) {
                schema = self.root.pointer(pointer.trim_start_matches('#')).unwrap_or(&Value::Null);
            } else if let Some(branches) = schema.get("anyOf").and_then(Value::as_array) {
                schema = branches.iter().find(|b| b["type"] != "null").unwrap_or(&Value::Null);
            } else {
                break;
            }
        }
        schema
    }

    fn value(&self, value: &mut Value, schema: &'a Value, path: &str, found: &mut Findings) {
        let schema = self.resolve(schema);
        match (type_of(schema), value) {
            ("object", Value::Object(map)) => self.object(map, schema, path, found),
            ("array", Value::Array(items)) => {
                for (i, item) in items.iter_mut().enumerate() {
                    self.value(item, &schema["items"], &format!("{path}[{i}]"), found);
                }
            }
            ("string", Value::String(_)) | ("boolean", Value::Bool(_)) => {}
            ("integer", Value::Number(n)) if n.as_u64().is_some_and(|n| u32::try_from(n).is_ok()) => {}
            (wanted, value) => found.add(path, mismatch(wanted, value)),
        }
    }

    fn object(&self, map: &mut Map<String, Value>, schema: &'a Value, path: &str, found: &mut Findings) {
        let properties = schema["properties"].as_object();
        // A map with free keys (labels, registries) has a schema for its values instead of properties.
        let free = schema.get("additionalProperties").filter(|s| s.is_object());
        if free.is_none() {
            map.retain(|_, value| !value.is_null());
        }
        for (name, value) in map.iter_mut() {
            if let Some(schema) = free {
                self.value(value, schema, &format!("{path}[{name:?}]"), found);
            } else if let Some(schema) = properties.and_then(|p| p.get(name)) {
                self.value(value, schema, &join(path, name), found);
            } else {
                let known = properties.into_iter().flat_map(Map::keys).map(String::as_str);
                found.add(
                    join(path, &cut(name)),
                    match did_you_mean(name, known.clone()) {
                        Some(meant) => format!("unknown field: did you mean '{meant}'?"),
                        None => format!("unknown field: there are {}", known.collect::<Vec<_>>().join(", ")),
                    },
                );
            }
        }
        for name in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !map.contains_key(name) {
                found.add(join(path, name), "is missing");
            }
        }
    }
}

fn cut(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(40).collect()
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The type a schema asks for; of an optional field the one that is not `null`.
fn type_of(schema: &Value) -> &str {
    match &schema["type"] {
        Value::String(name) => name,
        Value::Array(names) => names.iter().filter_map(Value::as_str).find(|n| *n != "null").unwrap_or("any"),
        _ => "any",
    }
}

fn mismatch(wanted: &str, value: &Value) -> String {
    let is = match value {
        Value::Null => "empty",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    };
    match (wanted, value) {
        ("string", Value::Number(n)) => format!("must be text, not a number: write \"{n}\" in quotes"),
        ("string", Value::Bool(b)) => format!("must be text, not {is}: write \"{b}\" in quotes"),
        ("string", _) => format!("must be text, not {is}"),
        ("integer", Value::Number(_)) => format!("must be a whole number from 0 to {}", u32::MAX),
        ("integer", _) => format!("must be a whole number, not {is}"),
        ("boolean", _) => format!("must be true or false, not {is}"),
        ("array", _) => format!("must be a list, not {is}"),
        _ => format!("must be a mapping, not {is}"),
    }
}

/// What there is to say about one field.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Explanation {
    /// The field's path, as it was asked for.
    pub path: String,
    /// Its type in words.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it must be there.
    pub required: bool,
    /// What it means.
    pub description: String,
    /// The fields below it.
    pub fields: Vec<Explanation>,
}

/// Explains the field at `path` (`network.links.match`; list indexes may be left out), or the whole file for "".
/// The error says what would have been right.
pub fn explain(path: &str) -> Result<Explanation, String> {
    let root = schema();
    let checker = Checker { root: &root };
    let (mut holder, mut field): (&Value, &Value) = (&Value::Null, &root);
    let (mut name, mut so_far) = (String::new(), String::new());
    for part in path.split('.').map(|p| p.split('[').next().unwrap_or(p)).filter(|p| !p.is_empty()) {
        holder = inner(&checker, field);
        let next = holder["properties"]
            .get(part)
            .or_else(|| holder.get("additionalProperties").filter(|s| s.is_object()));
        field = next.ok_or_else(|| unknown(holder, part, &so_far))?;
        name = part.to_owned();
        so_far = join(&so_far, part);
    }
    Ok(describe(&checker, holder, field, &name, &so_far, true))
}

fn unknown(holder: &Value, part: &str, so_far: &str) -> String {
    let names: Vec<&str> =
        holder["properties"].as_object().into_iter().flatten().map(|(k, _)| k.as_str()).collect();
    let place = if so_far.is_empty() { "the machine config".to_owned() } else { format!("'{so_far}'") };
    match did_you_mean(part, names.iter().copied()) {
        Some(meant) => format!("there is no '{part}' in {place}: did you mean '{meant}'?"),
        None if names.is_empty() => format!("{place} has no fields below it"),
        None => format!("there is no '{part}' in {place}: there are {}", names.join(", ")),
    }
}

/// The schema whose fields are meant: through references and into lists.
fn inner<'a>(checker: &Checker<'a>, field: &'a Value) -> &'a Value {
    let schema = checker.resolve(field);
    if type_of(schema) == "array" { checker.resolve(&schema["items"]) } else { schema }
}

fn describe<'a>(
    checker: &Checker<'a>,
    holder: &Value,
    field: &'a Value,
    name: &str,
    path: &str,
    deep: bool,
) -> Explanation {
    let description = field.get("description").or_else(|| checker.resolve(field).get("description"));
    let required = holder["required"].as_array().is_some_and(|names| names.iter().any(|n| n == name));
    let mut fields = Vec::new();
    if deep {
        let below = inner(checker, field);
        for (name, field) in below["properties"].as_object().into_iter().flatten() {
            fields.push(describe(checker, below, field, name, &join(path, name), false));
        }
    }
    Explanation {
        path: path.to_owned(),
        kind: kind(checker, field),
        required,
        description: description.and_then(Value::as_str).unwrap_or_default().replace('\n', " "),
        fields,
    }
}

fn kind<'a>(checker: &Checker<'a>, field: &'a Value) -> String {
    let schema = checker.resolve(field);
    match type_of(schema) {
        "array" => format!("list of {}", kind(checker, &schema["items"])),
        "object" => match schema.get("additionalProperties").filter(|s| s.is_object()) {
            Some(values) => format!("map of name to {}", kind(checker, values)),
            None => "section".into(),
        },
        "string" => "text".into(),
        "integer" => "whole number".into(),
        "boolean" => "true or false".into(),
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_explained_by_path() {
        let links = explain("network.links[0].match").unwrap();
        assert_eq!((links.kind.as_str(), links.required), ("section", true));
        assert!(links.fields.iter().any(|f| f.path == "network.links.match.mac" && !f.required));
        assert_eq!(explain("").unwrap().fields.len(), 8);
        assert_eq!(explain("node.labels").unwrap().kind, "map of name to text");
        assert_eq!(
            explain("network.lnks").unwrap_err(),
            "there is no 'lnks' in 'network': did you mean 'links'?"
        );
        assert!(explain("hostname.a").unwrap_err().contains("no fields"));
    }

    #[test]
    fn every_field_says_what_it_means() {
        fn walk(path: &str) {
            for field in explain(path).unwrap().fields {
                assert!(!field.description.is_empty(), "{}", field.path);
                walk(&field.path);
            }
        }
        walk("");
    }
}
