//! Network steps by netlink.

use crate::error::{Context, Result};
use crate::plan::network::{Address, Origin, Route, Step, Target};
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, CacheInfo};
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Does one step. Starting and stopping DHCP is the app's, which owns the clients.
pub async fn apply(netlink: &Handle, step: &Step) -> Result<()> {
    match step {
        Step::SetMtu(link, mtu) => {
            let message = LinkUnspec::new_with_index(link.index).mtu(*mtu).build();
            netlink.link().set(message).execute().await.context("set the MTU of", &link.name)
        }
        Step::Up(link) => {
            let message = LinkUnspec::new_with_index(link.index).up().build();
            netlink.link().set(message).execute().await.context("switch on", &link.name)
        }
        Step::SetAddress(link, address) => set_address(netlink, link, address).await,
        Step::RemoveAddress(link, net) => {
            let request = netlink.address().del(address_message(link, net));
            tolerate(request.execute().await, libc::EADDRNOTAVAIL).context("remove an address of", &link.name)
        }
        Step::AddRoute(link, route) => {
            let request = netlink.route().add(route_message(link, route)).replace();
            request.execute().await.context("add a route", format!("{route} on {}", link.name))
        }
        Step::RemoveRoute(link, route) => {
            let request = netlink.route().del(route_message(link, route));
            tolerate(request.execute().await, libc::ESRCH).context("remove a route of", &link.name)
        }
        Step::StartDhcp(_) | Step::StopDhcp(_) => Ok(()),
    }
}

/// What was to be removed may be gone already.
fn tolerate(
    result: std::result::Result<(), rtnetlink::Error>,
    errno: i32,
) -> std::result::Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -errno => Ok(()),
        other => other,
    }
}

async fn set_address(netlink: &Handle, link: &Target, address: &Address) -> Result<()> {
    let mut message = address_message(link, &address.net);
    if let Some(seconds) = address.seconds {
        let mut info = CacheInfo::default();
        info.ifa_preferred = seconds;
        info.ifa_valid = seconds;
        message.attributes.push(AddressAttribute::CacheInfo(info));
    }
    let mut request =
        netlink.address().add(link.index, address.net.addr(), address.net.prefix_len()).replace();
    *request.message_mut() = message;
    request.execute().await.context("add an address", format!("{} to {}", address.net, link.name))
}

fn address_message(link: &Target, net: &IpNet) -> AddressMessage {
    match net {
        IpNet::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new()
            .index(link.index)
            .address(v4.addr(), v4.prefix_len())
            .build(),
        IpNet::V6(v6) => AddressMessageBuilder::<Ipv6Addr>::new()
            .index(link.index)
            .address(v6.addr(), v6.prefix_len())
            .build(),
    }
}

fn route_message(link: &Target, route: &Route) -> RouteMessage {
    let protocol = match route.origin {
        Origin::Config => RouteProtocol::Static,
        Origin::Dhcp => RouteProtocol::Dhcp,
    };
    match route.to {
        IpNet::V4(to) => {
            let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(to.addr(), to.prefix_len())
                .output_interface(link.index)
                .priority(route.metric)
                .protocol(protocol);
            builder = match route.via {
                Some(IpAddr::V4(via)) => builder.gateway(via),
                Some(IpAddr::V6(_)) | None => builder.scope(RouteScope::Link),
            };
            if route.onlink { builder.onlink().build() } else { builder.build() }
        }
        IpNet::V6(to) => {
            let mut builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(to.addr(), to.prefix_len())
                .output_interface(link.index)
                .priority(route.metric)
                .protocol(protocol);
            if let Some(IpAddr::V6(via)) = route.via {
                builder = builder.gateway(via);
            }
            if route.onlink { builder.onlink().build() } else { builder.build() }
        }
    }
}
