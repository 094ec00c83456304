//! Links, addresses and routes as the kernel has them.

use crate::error::{Context, Result};
use crate::plan::network::{Address, Link, Origin, Route};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use rtnetlink::{Handle, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

/// The main routing table.
const MAIN_TABLE: u32 = 254;

/// All links with their addresses and our routes.
pub async fn observe(netlink: &Handle, sys: &Path) -> Result<Vec<Link>> {
    let messages: Vec<LinkMessage> =
        netlink.link().get().execute().try_collect().await.context("list", "links")?;
    let mut links: Vec<Link> = messages.iter().map(|message| link(message, sys)).collect();
    let messages: Vec<AddressMessage> =
        netlink.address().get().execute().try_collect().await.context("list", "addresses")?;
    for message in &messages {
        if let Some(link) = links.iter_mut().find(|l| l.index == message.header.index) {
            link.addresses.extend(address(message));
        }
    }
    for filter in
        [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
    {
        let messages: Vec<RouteMessage> =
            netlink.route().get(filter).execute().try_collect().await.context("list", "routes")?;
        for (index, route) in messages.iter().filter_map(route) {
            if let Some(link) = links.iter_mut().find(|l| l.index == index) {
                link.routes.push(route);
            }
        }
    }
    Ok(links)
}

fn link(message: &LinkMessage, sys: &Path) -> Link {
    let mut link = Link {
        index: message.header.index,
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        ..Link::default()
    };
    // A veth is what stands for a card in a container or a test.
    let mut virtual_kind = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name.clone(),
            LinkAttribute::CarrierUpCount(count) => link.plugged = *count,
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(mac) => link.mac = mac[..].try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                virtual_kind = infos.iter().any(|i| matches!(i, LinkInfo::Kind(k) if *k != InfoKind::Veth));
            }
            _ => {}
        }
    }
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    link.card = ethernet && !virtual_kind;
    link.mac = link.mac.filter(|_| ethernet);
    let driver = std::fs::read_link(sys.join("class/net").join(&link.name).join("device/driver"));
    link.driver = driver.ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    link
}

fn address(message: &AddressMessage) -> Option<Address> {
    let (mut local, mut peer, mut seconds) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::CacheInfo(info) if info.ifa_valid != u32::MAX => seconds = Some(info.ifa_valid),
            _ => {}
        }
    }
    let net = IpNet::new(local.or(peer)?, message.header.prefix_len).ok()?;
    Some(Address { net, seconds })
}

fn route(message: &RouteMessage) -> Option<(u32, Route)> {
    let origin = match message.header.protocol {
        RouteProtocol::Static => Origin::Config,
        RouteProtocol::Dhcp => Origin::Dhcp,
        _ => return None,
    };
    let v4 = message.header.address_family == rtnetlink::packet_route::AddressFamily::Inet;
    let mut destination: IpAddr =
        if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let (mut via, mut metric, mut index, mut table) = (None, 0, None, u32::from(message.header.table));
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = ip(to)?,
            RouteAttribute::Gateway(gateway) => via = ip(gateway),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Table(id) => table = *id,
            _ => {}
        }
    }
    if table != MAIN_TABLE {
        return None;
    }
    let to = IpNet::new(destination, message.header.destination_prefix_length).ok()?;
    let onlink = message.header.flags.contains(rtnetlink::packet_route::route::RouteFlags::Onlink);
    Some((index?, Route { to, via, metric, origin, onlink }))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}
