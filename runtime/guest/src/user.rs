//! Who runs a process: numbers or names, looked up in the image's `/etc/passwd` and `/etc/group`. ◇
//!
//! Pure: the texts are arguments. Lines that do not parse are skipped, as every C library does.

use atoll_spec::guest::User;

/// Numbers to run with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups, sorted.
    pub groups: Vec<u32>,
    /// Home directory, `/` when the image does not know the user.
    pub home: String,
}

struct PasswdEntry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn passwd(text: &str) -> impl Iterator<Item = PasswdEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or("");
        Some(PasswdEntry { name, uid, gid, home })
    })
}

struct GroupEntry<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn group(text: &str) -> impl Iterator<Item = GroupEntry<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(GroupEntry { name, gid, members: fields.next().unwrap_or("") })
    })
}

/// Finds the numbers. The error is one line.
pub fn look_up(user: &User, passwd_text: &str, group_text: &str) -> Result<Identity, String> {
    let (entry, uid, gid, extra) = match user {
        User::Ids { uid, gid, groups } => {
            let entry = passwd(passwd_text).find(|entry| entry.uid == *uid);
            (entry, *uid, *gid, groups)
        }
        User::Name { name, groups } => {
            let (user, group_name) = match name.split_once(':') {
                Some((user, group_name)) => (user, Some(group_name)),
                None => (name.as_str(), None),
            };
            let (entry, uid) = find_user(user, passwd_text)?;
            let gid = group_name.map(|name| find_group(name, group_text)).transpose()?;
            (entry, uid, gid, groups)
        }
    };
    let explicit_group = gid.is_some();
    let gid = gid.or(entry.as_ref().map(|entry| entry.gid)).unwrap_or(0);
    let mut all: Vec<u32> = extra.clone();
    // As everywhere: with an explicit group in the image's user, the memberships of /etc/group do not count.
    if let Some(entry) = &entry
        && !(explicit_group && matches!(user, User::Name { .. }))
    {
        let member = |group: &GroupEntry<'_>| group.members.split(',').any(|name| name.trim() == entry.name);
        all.extend(group(group_text).filter(member).map(|group| group.gid));
    }
    all.push(gid);
    all.sort_unstable();
    all.dedup();
    let home = entry.map(|entry| entry.home).filter(|home| !home.is_empty()).unwrap_or("/");
    Ok(Identity { uid, gid, groups: all, home: home.to_owned() })
}

fn find_user<'a>(name: &str, text: &'a str) -> Result<(Option<PasswdEntry<'a>>, u32), String> {
    let name = if name.is_empty() { "0" } else { name };
    if let Some(entry) = passwd(text).find(|entry| entry.name == name) {
        let uid = entry.uid;
        return Ok((Some(entry), uid));
    }
    match name.parse::<u32>() {
        Ok(uid) => Ok((passwd(text).find(|entry| entry.uid == uid), uid)),
        Err(_) => {
            Err(format!("user '{name}' is not in the image's /etc/passwd: use a number or another image"))
        }
    }
}

fn find_group(name: &str, text: &str) -> Result<u32, String> {
    if let Some(entry) = group(text).find(|entry| entry.name == name) {
        return Ok(entry.gid);
    }
    name.parse().map_err(|_| {
        format!("group '{name}' is not in the image's /etc/group: use a number or another image")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbad line\nweb:x:33:34:Web:/srv:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:40:web,other\n7:x:70:\n";

    fn named(name: &str) -> Result<Identity, String> {
        look_up(&User::Name { name: name.into(), groups: vec![9] }, PASSWD, GROUP)
    }

    #[test]
    fn names_and_numbers() {
        let web = named("web").unwrap();
        assert_eq!((web.uid, web.gid, web.groups, web.home.as_str()), (33, 34, vec![9, 34, 40], "/srv"));
        let by_number = named("33").unwrap();
        assert_eq!((by_number.uid, by_number.gid), (33, 34));
        let unknown = named("1000").unwrap();
        assert_eq!((unknown.uid, unknown.gid, unknown.home.as_str()), (1000, 0, "/"));
        let both = named("web:log").unwrap();
        assert_eq!((both.gid, both.groups), (40, vec![9, 40]));
        assert_eq!(named("5:6").unwrap().gid, 6);
        assert_eq!(named("").unwrap().uid, 0);
        assert!(named("nobody").is_err());
        assert!(named("web:nogroup").is_err());
    }

    #[test]
    fn ids_take_the_images_groups_too() {
        let user = User::Ids { uid: 33, gid: None, groups: vec![5] };
        assert_eq!(look_up(&user, PASSWD, GROUP).unwrap().groups, [5, 34, 40]);
        let user = User::Ids { uid: 33, gid: Some(99), groups: vec![] };
        let identity = look_up(&user, PASSWD, GROUP).unwrap();
        assert_eq!((identity.gid, identity.groups), (99, vec![40, 99]));
        let user = User::Ids { uid: 4, gid: None, groups: vec![] };
        assert_eq!(look_up(&user, "", "").unwrap().gid, 0);
    }
}
